//! Signals by name.

use caisson_proto::cri;

/// Numbers of the named signals on x86-64 (signal(7)).
const NAMES: [(&str, i32); 36] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("RTMIN", 34),
    ("RTMAX", 64),
];

/// SIGTERM, what asks a process to stop when nothing else is said.
pub const TERM: i32 = 15;
/// SIGKILL.
pub const KILL: i32 = 9;

/// A signal by number or by name, such as 15, TERM, SIGTERM or SIGRTMIN+3.
pub fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(name, _)| *name == bare) {
        return Some(*number);
    }
    let offset = |n: &str| n.parse::<i32>().ok().filter(|n| (0..=30).contains(n));
    let number = if let Some(n) = bare.strip_prefix("RTMIN+") {
        34 + offset(n)?
    } else if let Some(n) = bare.strip_prefix("RTMAX-") {
        64 - offset(n)?
    } else {
        return None;
    };
    (34..=64).contains(&number).then_some(number)
}

/// A CRI `Signal`; `None` for RUNTIME_DEFAULT and for a value that is not known.
pub fn from_cri(signal: i32) -> Option<i32> {
    let signal = cri::Signal::try_from(signal).ok()?;
    parse(
        &signal
            .as_str_name()
            .replace("PLUS", "+")
            .replace("MINUS", "-"),
    )
}

/// The CRI `Signal` of a number, RUNTIME_DEFAULT if there is none.
pub fn to_cri(number: i32) -> cri::Signal {
    (1..=65)
        .filter_map(|value| cri::Signal::try_from(value).ok())
        .find(|signal| from_cri(*signal as i32) == Some(number))
        .unwrap_or(cri::Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, number) in [
            ("15", 15),
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigquit", 3),
            ("SIGRTMIN+3", 37),
            ("SIGRTMAX-1", 63),
            ("SIGRTMAX", 64),
        ] {
            assert_eq!(parse(text), Some(number), "{text}");
        }
        for text in ["", "0", "65", "-1", "SIGNOTHING", "SIGRTMIN+99", "RTMIN+"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn every_signal_of_the_interface_is_known_but_the_default() {
        assert_eq!(from_cri(0), None);
        for value in 1..=65 {
            assert!(from_cri(value).is_some(), "{value}");
        }
        assert_eq!(from_cri(cri::Signal::Sigrtminplus3 as i32), Some(37));
        assert_eq!(to_cri(15), cri::Signal::Sigterm);
    }
}
