//! Checks of what every request carries.

use thiserror::Error;

const ID_MAX: usize = 128;

/// An id that cannot name anything.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{what} {id:?} is not 1 to 128 of A-Z a-z 0-9 _ . -, beginning with a letter or digit")]
pub struct InvalidId {
    what: &'static str,
    id: String,
}

/// Checks a container's id. It becomes a directory and a cgroup.
///
/// # Errors
/// [`InvalidId`].
pub fn container_id(id: &str) -> Result<(), InvalidId> {
    check("container id", id)
}

/// Checks an exec's id. It becomes a word of a stream's header line.
///
/// # Errors
/// [`InvalidId`].
pub fn exec_id(id: &str) -> Result<(), InvalidId> {
    check("exec id", id)
}

fn check(what: &'static str, id: &str) -> Result<(), InvalidId> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let starts_well = id
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if id.len() <= ID_MAX && starts_well && id.bytes().all(allowed) {
        return Ok(());
    }
    Err(InvalidId {
        what,
        id: id.chars().take(ID_MAX).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        for good in ["a", "0", "A_b.c-d", &"x".repeat(128)] {
            assert_eq!(container_id(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "-",
            "-a",
            ".a",
            "a/b",
            "a b",
            "a\n",
            "a\0",
            "é",
            &"x".repeat(129),
        ] {
            assert!(exec_id(bad).is_err(), "{bad:?}");
        }
    }
}
