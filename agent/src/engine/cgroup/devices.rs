//! The device cgroup: an eBPF program that the kernel asks before a device is opened or made
//! (Documentation/admin-guide/cgroup-v2.rst, "Device controller").
//!
//! Rules are read as in cgroup v1: from none allowed, each rule in turn allows or denies, bit by bit of read,
//! write and mknod, so that the last rule that speaks of a bit decides it. The program walks the rules from
//! the last to the first and keeps the bits that are still open.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::engine::spec::{DeviceRule, SpecError};

/// How often a program is offered to the kernel that it was too busy to check.
const LOAD_TRIES: u32 = 64;

// Of linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_DEVCG_DEV_BLOCK: u32 = 1;
const BPF_DEVCG_DEV_CHAR: u32 = 2;
const BPF_DEVCG_ACC_MKNOD: u32 = 1;
const BPF_DEVCG_ACC_READ: u32 = 2;
const BPF_DEVCG_ACC_WRITE: u32 = 4;

/// A rule in the kernel's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    allow: bool,
    /// `BPF_DEVCG_DEV_*`; none: both.
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    /// `BPF_DEVCG_ACC_*`.
    access: u32,
}

/// Devices every container can use (config-linux.md, "Default Devices"), and making nodes of any kind:
/// a node that cannot be opened harms nobody.
const DEFAULTS: &[(u32, Option<u32>, Option<u32>, u32)] = &[
    (BPF_DEVCG_DEV_CHAR, None, None, BPF_DEVCG_ACC_MKNOD),
    (BPF_DEVCG_DEV_BLOCK, None, None, BPF_DEVCG_ACC_MKNOD),
    (BPF_DEVCG_DEV_CHAR, Some(1), Some(3), 7), // null
    (BPF_DEVCG_DEV_CHAR, Some(1), Some(5), 7), // zero
    (BPF_DEVCG_DEV_CHAR, Some(1), Some(7), 7), // full
    (BPF_DEVCG_DEV_CHAR, Some(1), Some(8), 7), // random
    (BPF_DEVCG_DEV_CHAR, Some(1), Some(9), 7), // urandom
    (BPF_DEVCG_DEV_CHAR, Some(5), Some(0), 7), // tty
    (BPF_DEVCG_DEV_CHAR, Some(5), Some(2), 7), // ptmx
    (BPF_DEVCG_DEV_CHAR, Some(136), None, 7),  // pts/*
];

impl Rule {
    /// The rules of a spec followed by the defaults.
    ///
    /// # Errors
    /// Names a field with a value that cannot be.
    pub fn resolve(listed: &[DeviceRule]) -> Result<Vec<Self>, SpecError> {
        let mut rules = Vec::with_capacity(listed.len() + DEFAULTS.len());
        for (index, rule) in listed.iter().enumerate() {
            let field = |name: &str| format!("linux.resources.devices[{index}].{name}");
            let kind = match rule.kind.as_str() {
                "" | "a" => None,
                "b" => Some(BPF_DEVCG_DEV_BLOCK),
                "c" | "u" => Some(BPF_DEVCG_DEV_CHAR),
                other => {
                    return Err(SpecError::invalid(
                        field("type"),
                        format!("{other:?} is not one of a, b and c"),
                    ));
                }
            };
            let number = |value: Option<i64>, name: &str| match value {
                None | Some(-1) => Ok(None),
                // The kernel's own limits are 12 and 20 bits.
                Some(value @ 0..=0xf_ffff) => Ok(Some(value as u32)),
                Some(value) => Err(SpecError::invalid(
                    field(name),
                    format!("{value} is not a device number"),
                )),
            };
            let mut access = 0;
            for letter in rule.access.chars() {
                access |= match letter {
                    'r' => BPF_DEVCG_ACC_READ,
                    'w' => BPF_DEVCG_ACC_WRITE,
                    'm' => BPF_DEVCG_ACC_MKNOD,
                    other => {
                        return Err(SpecError::invalid(
                            field("access"),
                            format!("{other:?} is not one of r, w and m"),
                        ));
                    }
                };
            }
            rules.push(Self {
                allow: rule.allow,
                kind,
                major: number(rule.major, "major")?,
                minor: number(rule.minor, "minor")?,
                access: if access == 0 { 7 } else { access },
            });
        }
        rules.extend(DEFAULTS.iter().map(|&(kind, major, minor, access)| Self {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        }));
        Ok(rules)
    }
}

// eBPF operations (linux/bpf_common.h, linux/bpf.h).
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOV_REGISTER: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const MOV_VALUE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const AND_VALUE: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const JUMP: u8 = 0x05; // BPF_JMP | BPF_JA
const JUMP_ANY_BIT: u8 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const EXIT: u8 = 0x95;

/// An eBPF instruction, as the kernel lays it out.
fn instruction(code: u8, destination: u8, source: u8, offset: i16, value: u32) -> u64 {
    u64::from(code)
        | u64::from(destination | source << 4) << 8
        | u64::from(offset as u16) << 16
        | u64::from(value) << 32
}

/// The program for `rules`.
pub(crate) fn program(rules: &[Rule]) -> Vec<u64> {
    // r1: struct bpf_cgroup_dev_ctx; r2: kind; r3: bits still open; r4, r5: numbers; r6: scratch.
    let mut out = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOV_REGISTER, 3, 2, 0, 0),
        instruction(AND_VALUE, 2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let conditions: Vec<(u8, u32)> = [(2, rule.kind), (4, rule.major), (5, rule.minor)]
            .into_iter()
            .filter_map(|(register, value)| value.map(|value| (register, value)))
            .collect();
        let verdict = if rule.allow {
            vec![
                instruction(AND_VALUE, 3, 0, 0, !rule.access & 7),
                instruction(JUMP_NOT_EQUAL, 3, 0, 2, 0),
                instruction(MOV_VALUE, 0, 0, 0, 1),
                instruction(EXIT, 0, 0, 0, 0),
            ]
        } else {
            vec![
                instruction(JUMP_ANY_BIT, 3, 0, 1, rule.access),
                instruction(JUMP, 0, 0, 2, 0),
                instruction(MOV_VALUE, 0, 0, 0, 0),
                instruction(EXIT, 0, 0, 0, 0),
            ]
        };
        let count = conditions.len();
        for (index, (register, value)) in conditions.into_iter().enumerate() {
            let skip = (count - index - 1 + verdict.len()) as i16;
            out.push(instruction(JUMP_NOT_EQUAL, register, 0, skip, value));
        }
        out.extend(verdict);
    }
    out.push(instruction(MOV_VALUE, 0, 0, 0, 0));
    out.push(instruction(EXIT, 0, 0, 0, 0));
    out
}

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replace: u32,
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes are of the size that is passed with them, the kernel takes what is beyond as zero,
    // and what they point at is alive in the callers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

/// Loads a program and attaches it to a group. It lives as long as the group.
///
/// # Errors
/// The kernel's.
pub(super) fn attach(group: BorrowedFd<'_>, program: &[u64]) -> io::Result<()> {
    let load = || {
        bpf(
            BPF_PROG_LOAD,
            &LoadAttributes {
                program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
                count: program.len() as u32,
                instructions: program.as_ptr() as u64,
                license: c"Apache-2.0".as_ptr() as u64,
                ..LoadAttributes::default()
            },
        )
    };
    // A signal in the middle of its check, such as that of another container's end, makes the kernel give up.
    let mut tries = LOAD_TRIES;
    let loaded = loop {
        match load() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries > 1 => tries -= 1,
            done => break done?,
        }
    };
    // SAFETY: the kernel just made this descriptor for us.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded) };
    bpf(
        BPF_PROG_ATTACH,
        &AttachAttributes {
            target: group.as_raw_fd() as u32,
            program: loaded.as_raw_fd() as u32,
            kind: BPF_CGROUP_DEVICE,
            ..AttachAttributes::default()
        },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel does, on one request.
    fn allowed(program: &[u64], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0usize;
        loop {
            let packed = program[at];
            at += 1;
            let (destination, source) =
                ((packed >> 8) as usize & 0xf, (packed >> 12) as usize & 0xf);
            let (offset, value) = ((packed >> 16) as i16, packed >> 32);
            let jump = |at: usize| at.checked_add_signed(offset.into()).unwrap();
            match packed as u8 {
                LOAD_WORD => registers[destination] = context[offset as usize / 4].into(),
                MOV_REGISTER => registers[destination] = registers[source],
                MOV_VALUE => registers[destination] = value,
                AND_VALUE => registers[destination] &= value,
                SHIFT_RIGHT => registers[destination] >>= value,
                JUMP => at = jump(at),
                JUMP_NOT_EQUAL if registers[destination] != value => at = jump(at),
                JUMP_ANY_BIT if registers[destination] & value != 0 => at = jump(at),
                JUMP_NOT_EQUAL | JUMP_ANY_BIT => {}
                EXIT => return registers[0] != 0,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn compiled(json: &str) -> Vec<u64> {
        let rules: Vec<DeviceRule> = serde_json::from_str(json).unwrap();
        program(&Rule::resolve(&rules).unwrap())
    }

    const CHAR: u32 = BPF_DEVCG_DEV_CHAR;
    const BLOCK: u32 = BPF_DEVCG_DEV_BLOCK;
    const READ: u32 = BPF_DEVCG_ACC_READ;
    const WRITE: u32 = BPF_DEVCG_ACC_WRITE;
    const MKNOD: u32 = BPF_DEVCG_ACC_MKNOD;

    #[test]
    fn without_rules_only_the_default_devices_are_open() {
        let program = compiled("[]");
        for minor in [3, 5, 7, 8, 9] {
            assert!(allowed(&program, CHAR, READ | WRITE, 1, minor));
        }
        assert!(allowed(&program, CHAR, READ | WRITE, 136, 77));
        assert!(allowed(&program, BLOCK, MKNOD, 8, 0));
        assert!(!allowed(&program, BLOCK, READ, 8, 0));
        assert!(!allowed(&program, BLOCK, READ | MKNOD, 8, 0));
        assert!(!allowed(&program, CHAR, READ, 1, 1), "/dev/mem");
        assert!(
            !allowed(&program, BLOCK, READ, 1, 3),
            "a block device of the same number"
        );
    }

    #[test]
    fn the_last_rule_that_speaks_of_a_bit_decides_it() {
        let program = compiled(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"b","major":8,"minor":16,"access":"rw"},
                {"allow":true,"type":"c","major":10,"minor":-1},
                {"allow":false,"type":"c","major":10,"minor":200,"access":"w"}]"#,
        );
        assert!(allowed(&program, BLOCK, READ | WRITE, 8, 16));
        assert!(!allowed(&program, BLOCK, READ, 8, 17));
        assert!(allowed(&program, CHAR, READ | WRITE | MKNOD, 10, 229));
        assert!(allowed(&program, CHAR, READ, 10, 200));
        assert!(
            !allowed(&program, CHAR, READ | WRITE, 10, 200),
            "one denied bit is enough"
        );
    }

    #[test]
    fn everything_can_be_allowed() {
        let program = compiled(r#"[{"allow":true,"type":"a","access":"rwm"}]"#);
        assert!(allowed(&program, BLOCK, READ | WRITE | MKNOD, 259, 1));
        assert!(allowed(&program, CHAR, READ | WRITE, 1, 1));
    }

    #[test]
    fn what_cannot_be_names_its_field() {
        for (json, field) in [
            (r#"[{"type":"x"}]"#, "devices[0].type"),
            (r#"[{"access":"rx"}]"#, "devices[0].access"),
            (r#"[{"major":-2}]"#, "devices[0].major"),
            (r#"[{"minor":4294967296}]"#, "devices[0].minor"),
        ] {
            let rules: Vec<DeviceRule> = serde_json::from_str(json).unwrap();
            let error = Rule::resolve(&rules).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
