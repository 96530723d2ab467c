use super::*;
use crate::image::testing::Tar;

fn entries(bytes: &[u8]) -> io::Result<Vec<Entry>> {
    let mut reader = TarReader::new(Stream(bytes));
    std::iter::from_fn(|| reader.next().transpose()).collect()
}

#[test]
fn long_names_of_gnu() {
    let (path, link) = ("p".repeat(300), "l".repeat(400));
    let tar = Tar::default()
        .raw(
            b'L',
            "././@LongLink",
            "",
            format!("{path}\0").as_bytes(),
            0o644,
        )
        .raw(
            b'K',
            "././@LongLink",
            "",
            format!("{link}\0").as_bytes(),
            0o644,
        )
        .symlink("short", "short")
        .end();
    let entry = &entries(&tar).unwrap()[0];
    assert_eq!(entry.path, path.as_bytes());
    assert_eq!(entry.kind, EntryKind::Symlink(link.into_bytes()));
}

#[test]
fn entries_of_the_tar_crate() {
    let mut builder = tar::Builder::new(Vec::new());
    let path = "deep/".repeat(60) + "file";
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o640);
    header.set_uid(1 << 31);
    builder
        .append_data(&mut header, &path, &b"hello"[..])
        .unwrap();
    let bytes = builder.into_inner().unwrap();
    let mut reader = TarReader::new(Stream(&bytes[..]));
    let entry = reader.next().unwrap().unwrap();
    assert_eq!(
        (entry.path, entry.mode, entry.uid),
        (path.into_bytes(), 0o640, 1 << 31)
    );
    let mut data = [0; 8];
    assert_eq!(reader.read_data(&mut data).unwrap(), 5);
    assert_eq!(&data[..5], b"hello");
    assert_eq!(reader.read_data(&mut data).unwrap(), 0);
    assert!(reader.next().unwrap().is_none());
}

#[test]
fn a_global_header_holds_for_all() {
    let tar = Tar::default()
        .raw(b'g', "g", "", b"10 uid=77\n", 0o644)
        .file("a", b"")
        .pax(&[("uid", b"5")])
        .file("b", b"")
        .file("c", b"")
        .end();
    let uids: Vec<u64> = entries(&tar)
        .unwrap()
        .iter()
        .map(|entry| entry.uid)
        .collect();
    assert_eq!(uids, [77, 5, 77]);
}

#[test]
fn absurd_lengths() {
    for kind in [b'L', b'K', b'x', b'g'] {
        let header = Tar::header(kind, b"x", b"", 8 << 30, 0o644, (0, 0));
        let error = entries(&header).unwrap_err();
        assert!(error.to_string().contains("limit"), "{error}");
    }
    let mut header = Tar::header(b'0', b"x", b"", 0, 0o644, (0, 0));
    header[124..136].copy_from_slice(&[
        0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ]);
    Tar::seal(&mut header);
    assert!(entries(&header).is_err());
    let cut = Tar::default().file("x", &[1; 2000]).end();
    assert!(entries(&cut[..1500]).is_err());
    assert!(entries(&cut[..700]).is_err());
    assert!(entries(&Tar::default().pax(&[("path", b"x")]).end()).is_err());
    assert!(entries(&Tar::default().raw(b'Z', "x", "", b"", 0).end()).is_err());
    assert!(entries(b"").unwrap().is_empty());
}
