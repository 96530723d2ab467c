//! One input of the fuzzer, and of the tests that go before it: a layer from anybody.

use std::fs::File;
use std::io::Read;

use super::*;
use crate::image::erofs::reader;

/// Reads `blob` as a layer. It may be refused, with an error that the blob alone explains; if it is taken, the image must be
/// one that can be read, and the tar stream made again must be the one that came.
pub(crate) fn layer(blob: &[u8]) -> Option<std::collections::BTreeMap<Vec<u8>, reader::Found>> {
    const LIMIT: u64 = 16 << 20;
    let mut tar = Vec::new();
    let plain = Compression::sniff(blob).reader(blob).ok()?;
    // What does not decompress, or to too much, is for the conversion to find out.
    let _ = plain.take(LIMIT + 1).read_to_end(&mut tar);
    let spec = LayerSpec {
        blob: Some((Digest::of(blob), blob.len() as u64)),
        compression: None,
        diff_id: Digest::of(&tar),
    };
    let file = || tempfile::tempfile().expect("a temporary file");
    let (image, recipe) = (file(), file());
    let again = |file: &File| file.try_clone().expect("a second handle");
    let outputs = Outputs {
        image: again(&image),
        path: Path::new("fuzz"),
        recipe: again(&recipe),
        spool: file(),
    };
    let limits = UnpackLimits {
        max_bytes: LIMIT,
        max_ratio: 1000,
    };
    match convert(&spec, blob, outputs, &limits, &Watch::default()) {
        Ok(()) => {}
        Err(ImageError::Corrupt { .. } | ImageError::TooLarge { .. }) => return None,
        Err(error) => panic!("not the layer's fault: {error}"),
    }
    let whole = |mut file: File| {
        let mut bytes = Vec::new();
        io::Seek::rewind(&mut file).expect("a file of ours");
        file.read_to_end(&mut bytes).expect("a file of ours");
        bytes
    };
    io::Seek::rewind(&mut again(&recipe)).expect("a file of ours");
    let mut made = Vec::new();
    let mut stream = Again::new(recipe, again(&image)).expect("a recipe of ours");
    stream.read_to_end(&mut made).expect("a recipe of ours");
    assert!(
        made == tar,
        "the tar stream is another when it is made again"
    );
    let found = reader::read(&whole(image));
    Some(found.unwrap_or_else(|reason| panic!("the image cannot be read: {reason}")))
}
