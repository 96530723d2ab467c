//! Bombs, lies and damage.

use super::*;

// must-test: a decompression bomb
#[test]
fn bombs() {
    let zeros = vec![0; 3 << 20];
    let tar = Tar::default().file("zeros", &zeros).end();
    let limits = UnpackLimits {
        max_bytes: 2 << 20,
        max_ratio: 100,
    };
    for (compression, blob) in [
        (Compression::Gzip, gzip(&tar)),
        (Compression::Zstd, zstd::encode_all(&tar[..], 3).unwrap()),
    ] {
        let spec = LayerSpec {
            blob: Some((Digest::of(&blob), blob.len() as u64)),
            compression: Some(compression),
            diff_id: Digest::of(&tar),
        };
        let error = make_with(spec.clone(), &blob, limits).result.unwrap_err();
        assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
        assert!(make_with(spec, &blob, LIMITS).result.is_ok());
    }
    // A sparse file that says it has 4 EiB, and one whose map leads outside it.
    let huge = (1u64 << 62).to_string();
    let sparse = |size: &str, map: &[u8]| {
        Tar::default()
            .pax(&[
                ("GNU.sparse.size", size.as_bytes()),
                ("GNU.sparse.map", map),
            ])
            .file("s", b"")
            .end()
    };
    let error = make(&sparse(&huge, b"")).result.unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    refused(sparse("10", b"18446744073709551615,1"), "sparse map");
    refused(sparse("10", b"11,0"), "sparse map");
    refused(sparse("10", b"5,1"), "sparse map");
}

// must-test: a layer whose digest or diff ID does not match
#[test]
fn digests_and_sizes() {
    let tar = Tar::default().file("f", &[b'x'; 5000]).end();
    let blob = gzip(&tar);
    let good = LayerSpec {
        blob: Some((Digest::of(&blob), blob.len() as u64)),
        compression: Some(Compression::Gzip),
        diff_id: Digest::of(&tar),
    };
    assert!(make_with(good.clone(), &blob, LIMITS).result.is_ok());
    let wrong = Digest::of(b"other");
    let cases = [
        (
            LayerSpec {
                blob: Some((wrong, blob.len() as u64)),
                ..good.clone()
            },
            "digest",
        ),
        (
            LayerSpec {
                diff_id: wrong,
                ..good.clone()
            },
            "diff ID",
        ),
        (
            LayerSpec {
                blob: Some((Digest::of(&blob), blob.len() as u64 - 1)),
                ..good.clone()
            },
            "more than",
        ),
        (
            LayerSpec {
                blob: Some((Digest::of(&blob), blob.len() as u64 + 1)),
                ..good.clone()
            },
            "bytes",
        ),
        (
            LayerSpec {
                compression: Some(Compression::Zstd),
                ..good.clone()
            },
            "",
        ),
        (
            LayerSpec {
                compression: Some(Compression::None),
                ..good.clone()
            },
            "",
        ),
    ];
    for (spec, part) in cases {
        let error = make_with(spec, &blob, LIMITS).result.unwrap_err();
        assert!(
            matches!(error, ImageError::Corrupt { .. }) && error.to_string().contains(part),
            "{error}"
        );
    }
    for cut in [1, 5, 20, blob.len() / 2, blob.len() - 1] {
        let error = make_with(good.clone(), &blob[..cut], LIMITS)
            .result
            .unwrap_err();
        assert!(
            matches!(error, ImageError::Corrupt { .. }),
            "{cut}: {error}"
        );
    }
    // Bytes after the gzip stream.
    let longer = [&blob[..], b"tail"].concat();
    let spec = LayerSpec {
        blob: Some((Digest::of(&longer), longer.len() as u64)),
        ..good
    };
    assert!(make_with(spec, &longer, LIMITS).result.is_err());
}

#[test]
fn any_damage_is_an_error_or_harmless() {
    let tar = Tar::default()
        .dir("d", 0o755)
        .pax(&[("path", b"d/renamed"), ("SCHILY.xattr.user.a", b"b")])
        .file("d/f", &[b'x'; 700])
        .symlink("l", "d")
        .hard_link("h", "d/renamed")
        .pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"1,2")])
        .file("s", b"ab")
        .end();
    let mut kinds: BTreeMap<bool, u32> = BTreeMap::new();
    for at in (0..tar.len()).step_by(7) {
        let mut damaged = tar.clone();
        damaged[at] ^= 0x41;
        // The header's checksum would hide what comes behind it.
        let block = at / 512 * 512;
        if tar[block + 257..].starts_with(b"ustar") {
            let header: &mut [u8; 512] = (&mut damaged[block..block + 512]).try_into().unwrap();
            Tar::seal(header);
        }
        let limits = UnpackLimits {
            max_bytes: 1 << 20,
            ..LIMITS
        };
        let spec = LayerSpec {
            blob: None,
            compression: Some(Compression::None),
            diff_id: Digest::of(&damaged),
        };
        let made = make_with(spec, &damaged, limits);
        *kinds.entry(made.result.is_ok()).or_default() += 1;
    }
    assert!(kinds[&true] > 30 && kinds[&false] > 30, "{kinds:?}");
    for cut in (0..tar.len() - 1024).step_by(131) {
        let made = make(&tar[..cut]);
        assert!(cut % 512 == 0 || made.result.is_err(), "{cut}");
    }
}
