//! Archives of images: the members of a tar file, found once and then read where they are.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::image::error::ImageError;
use crate::image::layer::Compression;
use crate::image::layer::tar::{EntryKind, TarReader};

/// Most members of an archive.
const MAX_MEMBERS: usize = 100_000;
/// Most links that lead from a member's name to its data.
const MAX_LINKS: usize = 8;

/// A tar file, with the places of its members.
pub(in crate::image) struct Archive {
    path: PathBuf,
    file: Arc<File>,
    members: HashMap<String, Member>,
}

enum Member {
    Data {
        offset: u64,
        size: u64,
    },
    /// `docker save` writes a layer that several images have as links to the first.
    Link(String),
}

impl Archive {
    /// Reads the table of an archive. A compressed one is first unpacked to the file that `scratch` makes, up to `limit` bytes.
    pub(super) fn open_file(
        path: &Path,
        limit: u64,
        scratch: impl FnOnce() -> Result<File, ImageError>,
    ) -> Result<Self, ImageError> {
        let disk = |error| ImageError::disk("read", path, error);
        let what = path.display().to_string();
        let mut file = File::open(path).map_err(disk)?;
        let mut head = [0; 4];
        let count = file.read_at(&mut head, 0).map_err(disk)?;
        let compression = Compression::sniff(&head[..count]);
        if compression != Compression::None {
            let mut plain = scratch()?;
            let reader = compression
                .reader(file)
                .map_err(|error| ImageError::content(&what, error))?;
            unpack(&what, path, reader, &mut plain, limit)?;
            plain.rewind().map_err(disk)?;
            file = plain;
        }
        let length = file.metadata().map_err(disk)?.len();
        let mut reader = TarReader::new(file.try_clone().map_err(disk)?);
        let mut members = HashMap::new();
        while let Some(entry) = reader
            .next()
            .map_err(|error| ImageError::content(&what, error))?
        {
            let offset = reader.data_position().map_err(disk)?;
            let Some(name) = normal(&entry.path) else {
                return Err(ImageError::corrupt(
                    what,
                    "a member's name leads outside the archive or is not text",
                ));
            };
            let member = match entry.kind {
                EntryKind::File { size } if entry.sparse.is_none() => {
                    if offset.checked_add(size).is_none_or(|end| end > length) {
                        return Err(ImageError::corrupt(
                            what,
                            format!("it ends in the middle of {name}"),
                        ));
                    }
                    Member::Data { offset, size }
                }
                EntryKind::Symlink(target) => {
                    let base = name.rsplit_once('/').map_or("", |(base, _)| base);
                    match resolve(base, &target) {
                        Some(target) => Member::Link(target),
                        None => {
                            return Err(ImageError::corrupt(
                                what,
                                format!("{name} is a link that leads outside the archive"),
                            ));
                        }
                    }
                }
                EntryKind::HardLink(target) => match normal(&target) {
                    Some(target) => Member::Link(target),
                    None => {
                        return Err(ImageError::corrupt(
                            what,
                            format!("{name} is a link that leads outside the archive"),
                        ));
                    }
                },
                EntryKind::Directory => continue,
                _ => return Err(ImageError::corrupt(what, format!("{name} is not a file"))),
            };
            members.insert(name, member);
            if members.len() > MAX_MEMBERS {
                return Err(ImageError::too_large(
                    what,
                    format!("it has more than {MAX_MEMBERS} members"),
                ));
            }
        }
        Ok(Self {
            path: path.to_owned(),
            file: Arc::new(file),
            members,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the member with this name; `None` if there is none.
    pub(super) fn size(&self, name: &str) -> Option<u64> {
        self.find(name).map(|(_, size)| size)
    }

    pub(super) fn open(&self, name: &str) -> Result<Box<dyn Read + Send>, ImageError> {
        let (offset, size) = self.find(name).ok_or_else(|| {
            ImageError::corrupt(self.path.display().to_string(), format!("it has no {name}"))
        })?;
        Ok(Box::new(MemberReader {
            file: self.file.clone(),
            offset,
            left: size,
        }))
    }

    fn find(&self, name: &str) -> Option<(u64, u64)> {
        let mut name = name;
        for _ in 0..=MAX_LINKS {
            match self.members.get(name)? {
                Member::Data { offset, size } => return Some((*offset, *size)),
                Member::Link(target) => name = target,
            }
        }
        None
    }
}

/// Part of a file, without a file position of its own.
struct MemberReader {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Read for MemberReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..want], self.offset)?;
        if count == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

fn unpack(
    what: &str,
    path: &Path,
    mut from: impl Read,
    to: &mut File,
    limit: u64,
) -> Result<(), ImageError> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let count = from
            .read(&mut buffer)
            .map_err(|error| ImageError::content(what, error))?;
        if count == 0 {
            return Ok(());
        }
        total += count as u64;
        if total > limit {
            return Err(ImageError::too_large(
                what,
                format!(
                    "it unpacks to more than {limit} bytes; raise images.max_unpacked_gib if it is to be trusted"
                ),
            ));
        }
        io::Write::write_all(to, &buffer[..count])
            .map_err(|error| ImageError::disk("unpack", path, error))?;
    }
}

/// A member's name as text, without `.` and empty parts; `None` if it leads upwards.
fn normal(name: &[u8]) -> Option<String> {
    resolve("", name)
}

/// `target` as seen from the directory `base`.
fn resolve(base: &str, target: &[u8]) -> Option<String> {
    let target = std::str::from_utf8(target)
        .ok()
        .filter(|target| !target.contains('\0'))?;
    let base = if target.starts_with('/') { "" } else { base };
    let mut parts: Vec<&str> = Vec::new();
    for part in base.split('/').chain(target.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}
