//! Image layers side by side on one disk.
//!
//! A container comes when the machine has long been running, and brings layers. Each gets a place of its own on a disk
//! that is larger than all of them will ever be, so nothing is plugged in and no interrupt is raised: before the agent
//! is told of a place, nothing of interest is there. What is behind no layer reads as zeros. A place is never taken
//! back, and the files are the host's, read through its page cache: there, the pods of an image have it once.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{PoisonError, RwLock};

use super::super::buffers::Buffers;
use super::SECTOR;

/// The size of the disk in bytes: more than a file system of the host has.
pub const CAPACITY: u64 = 1 << 50;
/// Where a layer can begin. The first place has none: a partition table would be there.
const ALIGNMENT: u64 = 1 << 20;
/// The most layers: 127 for each of 60 containers. Each holds a descriptor.
const MOST: usize = 8192;
/// Bytes of the longest name of a layer.
const MAX_NAME: usize = 255;

/// Why a layer cannot be on the disk.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Its name is empty or too long.
    #[error("a layer's name has 1 to {MAX_NAME} bytes, and this one has {0}")]
    Name(usize),
    /// It is no regular file, or an empty one.
    #[error("the layer {0} is not a regular file with content: pull its image again")]
    NotAFile(String),
    /// A place that it is to have again cannot be one.
    #[error("the layer {0} cannot be at byte {1}: another one is there, or none ever was")]
    Place(String, u64),
    /// There is no place left.
    #[error(
        "the layer {name} cannot be given to the pod, which has {count} already; use another pod"
    )]
    Full {
        /// Its name.
        name: String,
        /// How many there are.
        count: usize,
    },
    /// The system cannot say what it is.
    #[error("the layer {name} cannot be examined: {source}")]
    Examine {
        /// Its name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

struct Layer {
    name: Box<str>,
    /// Its place, in whole sectors.
    place: Range<u64>,
    /// Bytes of the file.
    length: u64,
    file: File,
}

/// The layers, in the order of their places.
#[derive(Default)]
pub struct Layers(RwLock<Vec<Layer>>);

impl Layers {
    /// Gives a layer its place on the disk, in bytes; the one it has if there is one of this name.
    ///
    /// # Errors
    /// [`LayerError`].
    pub fn add(&self, name: &str, file: OwnedFd) -> Result<Range<u64>, LayerError> {
        self.place(name, file, None)
    }

    /// Gives a layer this place, behind all that are there.
    ///
    /// # Errors
    /// [`LayerError`].
    pub fn put(&self, name: &str, file: OwnedFd, offset: u64) -> Result<Range<u64>, LayerError> {
        self.place(name, file, Some(offset))
    }

    /// The layers' names and places, in the order of these.
    pub fn places(&self) -> Vec<(String, Range<u64>)> {
        let layers = self.0.read().unwrap_or_else(PoisonError::into_inner);
        layers
            .iter()
            .map(|layer| (layer.name.to_string(), layer.place.clone()))
            .collect()
    }

    fn place(
        &self,
        name: &str,
        file: OwnedFd,
        offset: Option<u64>,
    ) -> Result<Range<u64>, LayerError> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(LayerError::Name(name.len()));
        }
        let file = File::from(file);
        let meta = file.metadata().map_err(|source| LayerError::Examine {
            name: name.to_owned(),
            source,
        })?;
        if !meta.is_file() || meta.len() == 0 {
            return Err(LayerError::NotAFile(name.to_owned()));
        }
        // A panic cannot have torn the list: it only grows, by whole elements.
        let mut layers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = layers.iter().find(|layer| &*layer.name == name) {
            return Ok(known.place.clone());
        }
        let next = layers
            .last()
            .map_or(ALIGNMENT, |last| last.place.end.next_multiple_of(ALIGNMENT));
        let start = match offset {
            None => next,
            Some(at) if at >= next && at.is_multiple_of(ALIGNMENT) => at,
            Some(at) => return Err(LayerError::Place(name.to_owned(), at)),
        };
        let end = meta
            .len()
            .checked_next_multiple_of(SECTOR)
            .and_then(|bytes| start.checked_add(bytes))
            .filter(|end| *end <= CAPACITY && layers.len() < MOST);
        let Some(end) = end else {
            return Err(LayerError::Full {
                name: name.to_owned(),
                count: layers.len(),
            });
        };
        layers.push(Layer {
            name: name.into(),
            place: start..end,
            length: meta.len(),
            file,
        });
        Ok(start..end)
    }

    /// Reads from a byte of the disk on, until `into` is full.
    ///
    /// # Errors
    /// What the host's file system says.
    pub fn read(&self, mut offset: u64, into: &Buffers<'_>) -> io::Result<()> {
        let layers = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut rest = into.clone();
        while !rest.is_empty() {
            // The first that does not end before the byte.
            let next = layers.partition_point(|layer| layer.place.start + layer.length <= offset);
            let (count, layer) = match layers.get(next) {
                Some(layer) if layer.place.start <= offset => {
                    (layer.place.start + layer.length - offset, Some(layer))
                }
                Some(layer) => (layer.place.start - offset, None),
                None => (u64::MAX, None),
            };
            let count = usize::try_from(count).map_or(rest.len(), |count| count.min(rest.len()));
            let Some(mut part) = rest.split_front(count) else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            match layer {
                Some(layer) => part.fill_from(layer.file.as_fd(), offset - layer.place.start)?,
                None => while part.write(&[0; SECTOR as usize]) > 0 {},
            }
            offset += count as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    use vm_memory::VolatileSlice;

    fn file(content: &[u8]) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.into()
    }

    fn read(layers: &Layers, offset: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![9; count];
        let mut buffers = Buffers::default();
        // Two slices, so that a boundary is crossed inside and at the end of one.
        let (one, two) = bytes.split_at_mut(count / 3);
        buffers.push_back(VolatileSlice::from(one));
        buffers.push_back(VolatileSlice::from(two));
        layers.read(offset, &buffers).unwrap();
        bytes
    }

    #[test]
    fn layers_have_places_with_zeros_between() {
        let layers = Layers::default();
        let a = layers.add("a", file(&[1; 1500])).unwrap();
        let b = layers.add("b", file(&vec![2; 3 << 20])).unwrap();
        assert_eq!(a, ALIGNMENT..ALIGNMENT + 1536);
        assert_eq!(b, 2 * ALIGNMENT..5 * ALIGNMENT);
        // The same name is the same layer, whatever comes with it.
        assert_eq!(layers.add("a", file(&[7; 9000])).unwrap(), a);

        let expected = [vec![0; 100], vec![1; 1500], vec![0; 200]].concat();
        assert_eq!(read(&layers, ALIGNMENT - 100, 1800), expected);
        let expected = [vec![0; 512], vec![2; 512]].concat();
        assert_eq!(read(&layers, 2 * ALIGNMENT - 512, 1024), expected);
        let expected = [vec![2; 512], vec![0; 512]].concat();
        assert_eq!(read(&layers, b.end - 512, 1024), expected);
        assert_eq!(read(&layers, CAPACITY - 4096, 4096), vec![0; 4096]);
        assert_eq!(read(&layers, 0, 0), Vec::<u8>::new());
    }

    #[test]
    fn layers_get_their_places_again() {
        let layers = Layers::default();
        // Of the one before it nothing is left.
        layers.put("b", file(&[2; 600]), 3 * ALIGNMENT).unwrap();
        for taken in [0, ALIGNMENT, 3 * ALIGNMENT, 4 * ALIGNMENT + 512] {
            assert!(layers.put("c", file(&[3; 9]), taken).is_err(), "{taken}");
        }
        layers.add("c", file(&[3; 512])).unwrap();
        assert_eq!(read(&layers, ALIGNMENT, 64), vec![0; 64]);
        assert_eq!(read(&layers, 3 * ALIGNMENT, 64), vec![2; 64]);
        let b = ("b".to_owned(), 3 * ALIGNMENT..3 * ALIGNMENT + 1024);
        let c = ("c".to_owned(), 4 * ALIGNMENT..4 * ALIGNMENT + 512);
        assert_eq!(layers.places(), [b, c]);
    }

    #[test]
    fn what_is_no_layer_is_refused() {
        let layers = Layers::default();
        let nothing = layers.add("x", file(b"")).unwrap_err();
        assert!(nothing.to_string().contains("pull"), "{nothing}");
        // must-test: a directory of the host taken for a device.
        let directory = File::open("/").unwrap();
        assert!(layers.add("x", directory.into()).is_err());
        assert!(layers.add("", file(b"x")).is_err());
        assert!(layers.add(&"x".repeat(256), file(b"x")).is_err());
        let huge = tempfile::tempfile().unwrap();
        huge.set_len(1 << 40).unwrap();
        for number in 0..1023 {
            let again = huge.try_clone().unwrap();
            layers.add(&number.to_string(), again.into()).unwrap();
        }
        let full = layers.add("last", huge.into()).unwrap_err();
        assert!(full.to_string().contains("1023 already"), "{full}");
        layers.add("small", file(b"x")).unwrap();
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_and_no_more() {
        let layers = Layers::default();
        let shrinking = tempfile::tempfile().unwrap();
        shrinking.set_len(8192).unwrap();
        let place = layers.add("x", shrinking.try_clone().unwrap().into());
        let start = place.unwrap().start;
        shrinking.set_len(100).unwrap();
        let mut bytes = [0; 4096];
        let mut buffers = Buffers::default();
        buffers.push_back(VolatileSlice::from(bytes.as_mut_slice()));
        assert!(layers.read(start, &buffers).is_err());
    }
}
