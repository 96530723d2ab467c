//! What a pod process holds of the host's memory, guest and all, as the kernel says it.

use std::fs::File;
use std::io::{self, Read};

/// The most of `smaps_rollup` that is read: it has about 25 lines.
const LONGEST: u64 = 16 << 10;

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct HostMemory {
    /// Pages that no other process maps: what the host has back when the process ends.
    pub private: u64,
    /// Pages that others map too, such as those of a template that its clones have not written.
    pub shared: u64,
    /// The proportional set size: what is private, and of each shared page its part.
    pub proportional: u64,
}

impl HostMemory {
    /// Reads it of a process. The kernel looks at each page of the process and holds up its page faults meanwhile, so this
    /// is for when somebody asks.
    ///
    /// # Errors
    /// What the system says; `InvalidData` where a line is missing.
    pub fn read(pid: u32) -> io::Result<Self> {
        let mut text = String::new();
        File::open(format!("/proc/{pid}/smaps_rollup"))?
            .take(LONGEST)
            .read_to_string(&mut text)?;
        Self::parse(&text).ok_or_else(|| {
            let what = format!("/proc/{pid}/smaps_rollup has not the lines that it should have");
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
    }

    /// See proc(5): each line is a name, a number and "kB".
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
            let number = rest.strip_prefix(':')?.trim().strip_suffix(" kB")?;
            number.parse::<u64>().ok()?.checked_mul(1024)
        };
        let private = field("Private_Clean")?.checked_add(field("Private_Dirty")?)?;
        Some(Self {
            private,
            shared: field("Rss")?.saturating_sub(private),
            proportional: field("Pss")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_takes_is_private_to_it() {
        // As much as it may: another test may give memory back meanwhile.
        let before = HostMemory::read(std::process::id()).unwrap();
        let taken = vec![7_u8; 256 << 20];
        let after = HostMemory::read(std::process::id()).unwrap();
        assert!(
            after.private >= before.private + (192 << 20),
            "{before:?}, {after:?}"
        );
        assert!(after.proportional >= after.private && after.shared > 0);
        drop(taken);
    }

    #[test]
    fn lines_that_are_missing_or_wrong_are_noticed() {
        let text = "00400000-7fff5000 ---p 00000000 00:00 0  [rollup]\nRss:  100 kB\nPss:   70 kB\nPss_Anon: 1 kB\n\
                    Shared_Clean:   50 kB\nPrivate_Clean:   10 kB\nPrivate_Dirty:       40 kB\n";
        let found = HostMemory {
            private: 50 << 10,
            shared: 50 << 10,
            proportional: 70 << 10,
        };
        assert_eq!(HostMemory::parse(text), Some(found));
        assert_eq!(HostMemory::parse(&text.replace("Pss:", "Pxx:")), None);
        assert_eq!(HostMemory::parse(&text.replace("70 kB", "x kB")), None);
        assert_eq!(
            HostMemory::parse(&text.replace("70 kB", "99999999999999999 kB")),
            None
        );
        assert!(HostMemory::read(u32::MAX).is_err());
    }
}
