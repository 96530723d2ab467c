mod hostile;
mod round_trip;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;

use super::*;
use crate::image::testing::{Mounted, Tar, fsck, gzip, run};

/// A layer of a tar stream, with what belongs to it.
struct Made {
    directory: tempfile::TempDir,
    result: Result<(), ImageError>,
}

impl Made {
    fn path(&self) -> PathBuf {
        self.directory.path().join("layer.erofs")
    }

    /// The tar stream, made again.
    fn again(&self) -> Vec<u8> {
        let open = |path: PathBuf| fs::File::open(path).unwrap();
        let both = || {
            let recipe = open(self.directory.path().join("layer.recipe"));
            Again::new(recipe, open(self.path())).unwrap()
        };
        let mut tar = Vec::new();
        both().read_to_end(&mut tar).unwrap();
        assert_eq!(both().length().unwrap(), tar.len() as u64);
        tar
    }
}

const LIMITS: UnpackLimits = UnpackLimits {
    max_bytes: 1 << 30,
    max_ratio: 100,
};

fn make_with(spec: LayerSpec, blob: &[u8], limits: UnpackLimits) -> Made {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer.erofs");
    let outputs = Outputs {
        image: fs::File::create_new(&path).unwrap(),
        path: &path,
        recipe: fs::File::create_new(directory.path().join("layer.recipe")).unwrap(),
        spool: tempfile::tempfile().unwrap(),
    };
    let result = convert(&spec, blob, outputs, &limits, &Watch::default());
    Made { directory, result }
}

fn make(tar: &[u8]) -> Made {
    let spec = LayerSpec {
        blob: None,
        compression: None,
        diff_id: Digest::of(tar),
    };
    make_with(spec, tar, LIMITS)
}

/// Makes a layer, checks it, and mounts it.
fn mount(tar: &[u8]) -> Option<(Made, Mounted)> {
    let made = make(tar);
    made.result.as_ref().unwrap();
    assert!(
        made.again() == tar,
        "the tar stream is another when it is made again"
    );
    fsck(&made.path());
    let mounted = Mounted::new(&made.path())?;
    Some((made, mounted))
}

fn refused(tar: Vec<u8>, part: &str) {
    let error = make(&tar).result.unwrap_err();
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains(part), "{error}");
}

#[test]
fn every_kind_of_file_as_the_kernel_reads_it() {
    let big: Vec<u8> = (0..1_000_003u32).map(|at| ((at * 7) >> 3) as u8).collect();
    let long = "d/".repeat(60) + &"n".repeat(200);
    let capability =
        b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let tar = Tar::default()
        .dir("./", 0o755)
        .file("./empty", b"")
        .file("/absolute", b"short")
        .file("edge2048", &big[..2048])
        .file("edge2049", &big[..2049])
        .file("edge4096", &big[..4096])
        .file("big", &big)
        .owned("owned", b"x", 0o4755, (4_000_000_000, 70_000))
        .dir("sticky", 0o1777)
        .symlink("sticky/link", "../big")
        .hard_link("other", "big")
        .device(b'3', "null", 1, 3)
        .device(b'4', "disk", 259, 100_000)
        .raw(b'6', "pipe", "", b"", 0o600)
        .pax(&[
            ("path", long.as_bytes()),
            ("mtime", b"1700000000.123456789"),
        ])
        .file("x", b"long name")
        .pax(&[
            ("SCHILY.xattr.user.note", b"a\0=\nb"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.com.apple.provenance", b"left out"),
        ])
        .file("ping", b"elf")
        .end();
    let Some((_made, mounted)) = mount(&tar) else {
        return;
    };
    let meta = |name: &str| fs::symlink_metadata(mounted.path(name)).unwrap();
    for (name, data) in [
        ("empty", &b""[..]),
        ("absolute", b"short"),
        ("edge2048", &big[..2048]),
        ("edge2049", &big[..2049]),
        ("edge4096", &big[..4096]),
        ("big", &big),
        ("sticky/link", &big),
        ("other", &big),
        (&long, b"long name"),
    ] {
        assert!(fs::read(mounted.path(name)).unwrap() == data, "{name}");
    }
    // must-test: device nodes, set-uid bits and xattrs kept exactly as the image spec says
    let owned = meta("owned");
    assert_eq!(
        (owned.uid(), owned.gid(), owned.mode() & 0o7777),
        (4_000_000_000, 70_000, 0o4755)
    );
    assert_eq!(meta("sticky").permissions().mode() & 0o7777, 0o1777);
    assert_eq!(meta("sticky").nlink(), 2);
    assert_eq!(
        (meta("big").nlink(), meta("big").ino()),
        (2, meta("other").ino())
    );
    assert_eq!(
        fs::read_link(mounted.path("sticky/link")).unwrap().to_str(),
        Some("../big")
    );
    assert!(
        meta("null").file_type().is_char_device() && meta("disk").file_type().is_block_device()
    );
    assert_eq!(meta("null").rdev(), 1 << 8 | 3);
    assert_eq!(
        meta("disk").rdev(),
        259 << 8 | (100_000 & 0xff) | (100_000u64 & !0xff) << 12
    );
    assert!(meta("pipe").file_type().is_fifo());
    assert_eq!(
        (meta(&long).mtime(), meta(&long).mtime_nsec()),
        (1_700_000_000, 123_456_789)
    );
    let attributes = run(Command::new("python3")
        .args([
            "-c",
            "
import os, sys
print(sorted((n, os.getxattr(sys.argv[1], n).hex()) for n in os.listxattr(sys.argv[1])))",
        ])
        .arg(mounted.path("ping")));
    let hex: String = capability
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(
        attributes.trim(),
        format!("[('security.capability', '{hex}'), ('user.note', '61003d0a62')]")
    );
}

#[test]
fn large_directories_and_long_attributes() {
    let mut tar = Tar::default();
    let mut names = Vec::new();
    for at in 0..3000 {
        // Some sort before "." and "..".
        let name = format!(
            "{}{at:0width$}",
            ["!", "-", "a", "\u{e9}"][at % 4],
            width = 5 + at % 60
        );
        tar = tar
            .pax(&[("path", format!("many/{name}").as_bytes())])
            .file("x", name.as_bytes());
        names.push(name);
    }
    for size in [100, 2000, 4000, 4080, 9000, 60_000] {
        let value = vec![b'v'; size];
        let name = format!("attr{size}");
        tar = tar
            .pax(&[("SCHILY.xattr.user.v", &value)])
            .file(&name, &vec![b'd'; size.min(2048)]);
        tar = tar
            .pax(&[("SCHILY.xattr.trusted.v", &value)])
            .symlink(&format!("link{size}"), &"t".repeat(90));
        tar = tar
            .pax(&[("SCHILY.xattr.user.v", &value)])
            .dir(&format!("dir{size}"), 0o755);
        tar = tar.file(&format!("dir{size}/x"), b"");
    }
    let Some((_made, mounted)) = mount(&tar.end()) else {
        return;
    };
    let mut found: Vec<String> = fs::read_dir(mounted.path("many"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for name in &names {
        assert_eq!(
            fs::read_to_string(mounted.path("many").join(name)).unwrap(),
            *name
        );
    }
    assert!(!mounted.path("many/zzz").exists());
    found.sort();
    names.sort();
    assert_eq!(found, names);
    for size in [100, 2000, 4000, 4080, 9000, 60_000] {
        assert_eq!(
            fs::read(mounted.path(&format!("attr{size}"))).unwrap(),
            vec![b'd'; size.min(2048)]
        );
        assert_eq!(
            fs::read_link(mounted.path(&format!("link{size}")))
                .unwrap()
                .as_os_str()
                .len(),
            90
        );
        assert!(mounted.path(&format!("dir{size}/x")).exists());
        let length = "import os,sys; print(len(os.getxattr(sys.argv[1], 'user.v')))";
        let file = mounted.path(&format!("attr{size}"));
        assert_eq!(
            run(Command::new("python3").args(["-c", length]).arg(file)).trim(),
            size.to_string()
        );
    }
}

#[test]
fn the_same_layer_gives_the_same_bytes() {
    let tar = Tar::default()
        .file("b", b"1")
        .dir("a", 0o700)
        .file("a/c", &[7; 9000])
        .symlink("l", "a")
        .end();
    let (one, two) = (make(&tar), make(&tar));
    assert!(fs::read(one.path()).unwrap() == fs::read(two.path()).unwrap());
}

// must-test: whiteouts and opaque directories
#[test]
fn whiteouts() {
    let tar = Tar::default()
        .file("gone/.wh.file", b"")
        .file("opaque/.wh..wh..opq", b"")
        .dir("opaque", 0o711)
        .file("opaque/new", b"n")
        .file(".wh.replaced", b"")
        .file("replaced", b"file of this layer")
        .file(".wh.again", b"")
        .dir("again", 0o755)
        .file("later/kept", b"k")
        .file(".wh.later", b"")
        .file("kept", b"k")
        .file(".wh.kept", b"")
        .file(".wh..wh.plnk/1.2", b"aufs")
        .file(".wh..wh.aufs", b"aufs")
        .end();
    let Some((_made, mounted)) = mount(&tar) else {
        return;
    };
    let meta = |name: &str| fs::symlink_metadata(mounted.path(name)).unwrap();
    let opaque = |name: &str| {
        let get = "import os,sys; p=sys.argv[1]; n='trusted.overlay.opaque'; print(os.getxattr(p,n) if n in os.listxattr(p) else None)";
        run(Command::new("python3")
            .args(["-c", get])
            .arg(mounted.path(name)))
        .trim()
            == "b'y'"
    };
    assert!(meta("gone/file").file_type().is_char_device() && meta("gone/file").rdev() == 0);
    assert!(
        opaque("opaque")
            && mounted.path("opaque/new").exists()
            && meta("opaque").mode() & 0o777 == 0o711
    );
    assert_eq!(
        fs::read(mounted.path("replaced")).unwrap(),
        b"file of this layer"
    );
    assert!(opaque("again") && opaque("later") && !opaque("gone"));
    assert!(mounted.path("later/kept").exists() && mounted.path("kept").exists());
    assert_eq!(
        fs::read_dir(mounted.path(""))
            .unwrap()
            .filter(|e| e
                .as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with(".wh"))
            .count(),
        0
    );
    for name in ["a/.wh.", "a/.wh...", "a/.wh.."] {
        refused(Tar::default().file(name, b"").end(), "whiteout");
    }
}

#[test]
fn overlayfs_obeys_the_whiteouts() {
    let lower = Tar::default()
        .file("d/old", b"o")
        .file("gone", b"g")
        .file("kept", b"k")
        .end();
    let upper = Tar::default()
        .file(".wh.gone", b"")
        .file("d/.wh..wh..opq", b"")
        .file("d/new", b"n")
        .end();
    let (Some((_a, lower)), Some((_b, upper))) = (mount(&lower), mount(&upper)) else {
        return;
    };
    let target = tempfile::tempdir().unwrap();
    let options = format!(
        "lowerdir={}:{}",
        upper.path("").display(),
        lower.path("").display()
    );
    run(Command::new("mount")
        .args([
            "-t",
            "overlay",
            "overlay",
            "-o",
            options.replace("/:", ":").trim_end_matches('/'),
        ])
        .arg(target.path()));
    let list = run(Command::new("find")
        .arg(target.path())
        .args(["-type", "f", "-printf", "%P\n"]));
    run(Command::new("umount").arg(target.path()));
    let mut list: Vec<&str> = list.lines().collect();
    list.sort_unstable();
    assert_eq!(list, ["d/new", "kept"]);
}

// must-test: layer entries with absolute paths, `..`, hard links or symbolic links that lead outside
#[test]
fn paths_stay_in_the_layer() {
    refused(Tar::default().file("../escape", b"").end(), "..");
    refused(Tar::default().file("a/../../escape", b"").end(), "..");
    refused(Tar::default().file("a/..", b"").end(), "..");
    refused(Tar::default().symlink("..", "/").end(), "..");
    refused(
        Tar::default().hard_link("a", "../../etc/passwd").end(),
        "..",
    );
    refused(
        Tar::default().hard_link("a", "/etc/passwd").end(),
        "not in the layer",
    );
    refused(
        Tar::default()
            .symlink("l", "/etc")
            .hard_link("a", "l/passwd")
            .end(),
        "not in the layer",
    );
    refused(
        Tar::default().dir("d", 0o755).hard_link("a", "d").end(),
        "directory",
    );
    refused(
        Tar::default().file("f", b"").file("f/x", b"").end(),
        "not a directory",
    );
    refused(
        Tar::default()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/x", b"")
            .end(),
        "symbolic links",
    );
    refused(Tar::default().symlink("/", "/etc").end(), "root");
    refused(
        Tar::default()
            .pax(&[("path", "n".repeat(256).as_bytes())])
            .file("x", b"")
            .end(),
        "255",
    );
    refused(
        Tar::default()
            .pax(&[("path", "n/".repeat(1100).as_bytes())])
            .dir("x", 0o755)
            .end(),
        "deep",
    );
    refused(
        Tar::default()
            .pax(&[("SCHILY.xattr.trusted.overlay.redirect", b"/etc")])
            .file("x", b"")
            .end(),
        "overlay",
    );
    let outside = Tar::default()
        .symlink("up", "../../../../etc")
        .file("up/passwd", b"inside")
        .symlink("abs", "/var")
        .file("abs/x", b"inside")
        .symlink("d/rel", "../e")
        .file("d/rel/y", b"inside")
        .file("/lead//./ing", b"inside")
        .end();
    let Some((_made, mounted)) = mount(&outside) else {
        return;
    };
    for name in ["etc/passwd", "var/x", "e/y", "lead/ing"] {
        assert_eq!(fs::read(mounted.path(name)).unwrap(), b"inside", "{name}");
    }
    assert_eq!(
        fs::symlink_metadata(mounted.path("etc")).unwrap().mode() & 0o7777,
        0o755
    );
}

#[test]
fn the_last_of_several_entries_counts() {
    let tar = Tar::default()
        .file("f", b"one")
        .hard_link("same", "f")
        .file("f", b"two")
        .dir("d", 0o700)
        .file("d/kept", b"")
        .dir("d", 0o711)
        .dir("t", 0o755)
        .file("t/x", b"")
        .file("t", b"file now")
        .symlink("s", "x")
        .dir("s", 0o755)
        .file("s/y", b"")
        .hard_link("same", "same")
        .end();
    let Some((_made, mounted)) = mount(&tar) else {
        return;
    };
    assert_eq!(fs::read(mounted.path("f")).unwrap(), b"two");
    assert_eq!(fs::read(mounted.path("same")).unwrap(), b"one");
    assert_eq!(fs::metadata(mounted.path("same")).unwrap().nlink(), 1);
    assert_eq!(
        fs::metadata(mounted.path("d")).unwrap().mode() & 0o777,
        0o711
    );
    assert!(mounted.path("d/kept").exists() && mounted.path("s/y").exists());
    assert_eq!(fs::read(mounted.path("t")).unwrap(), b"file now");
}

// must-test: sparse and GNU/PAX long names
#[test]
fn what_tar_writes() {
    let source = tempfile::tempdir().unwrap();
    let deep = source
        .path()
        .join("long-".repeat(30))
        .join("name-".repeat(40));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("file"), b"deep").unwrap();
    std::os::unix::fs::symlink("t".repeat(300), deep.join("link")).unwrap();
    let sparse = fs::File::create(source.path().join("sparse")).unwrap();
    for at in 0..40u64 {
        std::os::unix::fs::FileExt::write_all_at(
            &sparse,
            format!("part {at}").as_bytes(),
            at * 300_000 + 5,
        )
        .unwrap();
    }
    sparse.set_len(40_000_000).unwrap();
    let expected = fs::read(source.path().join("sparse")).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=pax"],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
    ] {
        let archive = source.path().with_extension("tar");
        run(Command::new("tar")
            .args(format)
            .args(["--sparse", "-C"])
            .arg(source.path())
            .arg("-cf")
            .arg(&archive)
            .arg("."));
        let tar = fs::read(&archive).unwrap();
        fs::remove_file(&archive).unwrap();
        assert!(tar.len() < 2_000_000, "tar found no holes");
        let Some((made, mounted)) = mount(&tar) else {
            return;
        };
        assert!(
            fs::read(mounted.path("sparse")).unwrap() == expected,
            "{format:?}"
        );
        assert!(
            fs::metadata(made.path()).unwrap().blocks() * 512 < 10_000_000,
            "holes take space"
        );
        let deep = mounted
            .path("")
            .join(deep.strip_prefix(source.path()).unwrap());
        assert_eq!(fs::read(deep.join("file")).unwrap(), b"deep");
        assert_eq!(
            fs::read_link(deep.join("link")).unwrap().as_os_str().len(),
            300
        );
    }
}
