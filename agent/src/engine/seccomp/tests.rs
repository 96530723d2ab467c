use super::bpf::{AUDIT_ARCH_I386, AUDIT_ARCH_X86_64};
use super::*;

/// Runs a filter on one system call, as the kernel's machine does.
fn run(filter: &Filter, architecture: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_le_bytes());
    data.extend(architecture.to_le_bytes());
    data.extend(0u64.to_le_bytes());
    for arg in args {
        data.extend(arg.to_le_bytes());
    }
    let (mut at, mut accumulator) = (0usize, 0u32);
    loop {
        let packed = filter.instructions[at];
        let (code, jt, jf, k) = (
            (packed >> 48) as u16,
            (packed >> 40) as u8 as usize,
            (packed >> 32) as u8 as usize,
            packed as u32,
        );
        at += 1;
        let mut branch = |taken: bool| at += if taken { jt } else { jf };
        match code {
            0x20 => {
                let offset = k as usize;
                accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => branch(accumulator == k),
            0x25 => branch(accumulator > k),
            0x35 => branch(accumulator >= k),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn profile(json: &str) -> Seccomp {
    serde_json::from_str(json).unwrap()
}

fn native(filter: &Filter, name: &str, args: [u64; 6]) -> u32 {
    run(
        filter,
        AUDIT_ARCH_X86_64,
        number(X86_64, name).unwrap(),
        args,
    )
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

#[test]
fn every_listed_call_gets_its_action_and_others_the_default() {
    let filter = compile(&profile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"],"syscalls":[
            {"names":["read","write","mkdir","no_such_call"],"action":"SCMP_ACT_ALLOW"},
            {"names":["chmod"],"action":"SCMP_ACT_ERRNO","errnoRet":95},
            {"names":["ptrace"],"action":"SCMP_ACT_KILL_PROCESS"},
            {"names":["mount"],"action":"SCMP_ACT_TRAP"},
            {"names":["umount2"],"action":"SCMP_ACT_LOG"}]}"#,
    ))
    .unwrap();
    for line in X86_64.lines() {
        let (number, name) = line.split_once(' ').unwrap();
        let number: u32 = number.parse().unwrap();
        let expected = match name {
            "read" | "write" | "mkdir" => ALLOW,
            "chmod" => libc::SECCOMP_RET_ERRNO | 95,
            "ptrace" => KILL,
            "mount" => libc::SECCOMP_RET_TRAP,
            "umount2" => libc::SECCOMP_RET_LOG,
            // Newer than anything in the profile.
            _ if number > 166 => ENOSYS,
            _ => EPERM,
        };
        assert_eq!(
            run(&filter, AUDIT_ARCH_X86_64, number, [0; 6]),
            expected,
            "{name}"
        );
    }
    assert_eq!(run(&filter, AUDIT_ARCH_I386, 3, [0; 6]), KILL);
    assert_eq!(
        run(&filter, AUDIT_ARCH_X86_64, 0x4000_0000, [0; 6]),
        KILL,
        "x32 is not listed"
    );
}

#[test]
fn a_long_profile_keeps_its_jumps_and_both_architectures() {
    let names: Vec<_> = X86_64
        .lines()
        .filter_map(|line| {
            let (number, name) = line.split_once(' ')?;
            // Every other one, so that nothing merges and the tree has far jumps.
            (number.parse::<u32>().ok()? % 2 == 0).then_some(name)
        })
        .collect();
    let json = format!(
        r#"{{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
            "syscalls":[{{"names":{names:?},"action":"SCMP_ACT_ALLOW"}}]}}"#
    );
    let filter = compile(&profile(&json)).unwrap();
    assert!(filter.instructions.len() > 600);
    for line in X86_64.lines() {
        let number: u32 = line.split_once(' ').unwrap().0.parse().unwrap();
        let expected = if number.is_multiple_of(2) {
            ALLOW
        } else if number > 468 {
            ENOSYS
        } else {
            EPERM
        };
        assert_eq!(
            run(&filter, AUDIT_ARCH_X86_64, number, [0; 6]),
            expected,
            "{line}"
        );
        assert_eq!(
            run(&filter, AUDIT_ARCH_X86_64, number | 0x4000_0000, [0; 6]),
            expected,
            "{line} of x32"
        );
    }
    for line in I386.lines() {
        let (number, name) = line.split_once(' ').unwrap();
        let number: u32 = number.parse().unwrap();
        if number < 450 {
            let expected = if names.contains(&name) { ALLOW } else { EPERM };
            assert_eq!(
                run(&filter, AUDIT_ARCH_I386, number, [0; 6]),
                expected,
                "{name}"
            );
        }
    }
}

#[test]
fn comparisons_are_unsigned_and_64_bits_wide() {
    let points = [
        0,
        1,
        4,
        5,
        6,
        0xffff_ffff,
        0x1_0000_0000,
        0x1_0000_0005,
        0x1_0000_0006,
        0x2_0000_0004,
        u64::MAX,
    ];
    type Holds = fn(u64, u64) -> bool;
    let operators: [(&str, Holds); 6] = [
        ("EQ", |a, b| a == b),
        ("NE", |a, b| a != b),
        ("LT", |a, b| a < b),
        ("LE", |a, b| a <= b),
        ("GT", |a, b| a > b),
        ("GE", |a, b| a >= b),
    ];
    for (operator, holds) in operators {
        for value in points {
            let filter = compile(&profile(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["socket"],"action":"SCMP_ACT_ALLOW",
                    "args":[{{"index":2,"value":{value},"op":"SCMP_CMP_{operator}"}}]}}]}}"#
            )))
            .unwrap();
            for arg in points {
                let expected = if holds(arg, value) { ALLOW } else { EPERM };
                assert_eq!(
                    native(&filter, "socket", [9, 9, arg, 9, 9, 9]),
                    expected,
                    "{arg:#x} {operator} {value:#x}"
                );
            }
        }
    }
    let filter = compile(&profile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["clone"],"action":"SCMP_ACT_ALLOW",
            "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
    ))
    .unwrap();
    assert_eq!(native(&filter, "clone", [0x11, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(
        native(
            &filter,
            "clone",
            [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0]
        ),
        EPERM
    );
}

#[test]
fn conditions_of_a_rule_are_all_needed_but_of_one_argument_any() {
    let filter = compile(&profile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
            {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[
                {"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
            {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[
                {"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":1,"value":2,"op":"SCMP_CMP_EQ"}]}]}"#,
    ))
    .unwrap();
    assert_eq!(native(&filter, "personality", [8, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(native(&filter, "personality", [0; 6]), ALLOW);
    assert_eq!(native(&filter, "personality", [7, 0, 0, 0, 0, 0]), EPERM);
    assert_eq!(native(&filter, "socket", [1, 2, 0, 0, 0, 0]), ALLOW);
    assert_eq!(native(&filter, "socket", [1, 3, 0, 0, 0, 0]), EPERM);
    assert_eq!(native(&filter, "socket", [2, 2, 0, 0, 0, 0]), EPERM);
}

#[test]
fn the_rule_with_conditions_goes_first() {
    let filter = compile(&profile(
        r#"{"defaultAction":"SCMP_ACT_KILL","syscalls":[
            {"names":["socket"],"action":"SCMP_ACT_ALLOW"},
            {"names":["socket"],"action":"SCMP_ACT_ERRNO","errnoRet":97,"args":[{"index":0,"value":40,"op":"SCMP_CMP_EQ"}]}]}"#,
    ))
    .unwrap();
    assert_eq!(native(&filter, "socket", [1, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(
        native(&filter, "socket", [40, 0, 0, 0, 0, 0]),
        libc::SECCOMP_RET_ERRNO | 97
    );
}

#[test]
fn an_allowing_default_stays_for_unknown_calls() {
    let filter = compile(&profile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}"#,
    ))
    .unwrap();
    assert_eq!(native(&filter, "mkdir", [0; 6]), EPERM);
    assert_eq!(native(&filter, "mkdirat", [0; 6]), ALLOW);
    assert_eq!(run(&filter, AUDIT_ARCH_X86_64, 5000, [0; 6]), ALLOW);
}

#[test]
fn what_cannot_be_done_is_an_error_that_names_the_field() {
    let syscall =
        |rule: &str| format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rule}]}}"#);
    for (json, names) in [
        (
            r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#.to_owned(),
            "defaultAction",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_X"]}"#.to_owned(),
            "flags",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["VAX"]}"#.to_owned(),
            "architectures",
        ),
        (
            syscall(r#"{"names":["read"],"action":"SCMP_ACT_NOTIFY"}"#),
            "syscalls[0].action",
        ),
        (
            syscall(r#"{"names":[],"action":"SCMP_ACT_KILL"}"#),
            "syscalls[0].names",
        ),
        (
            syscall(r#"{"names":["read"],"action":"SCMP_ACT_ERRNO","errnoRet":5000}"#),
            "syscalls[0].action",
        ),
        (
            syscall(
                r#"{"names":["read"],"action":"SCMP_ACT_KILL","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}"#,
            ),
            "syscalls[0].args.index",
        ),
        (
            syscall(
                r#"{"names":["read"],"action":"SCMP_ACT_KILL","args":[{"index":0,"value":0,"op":"SCMP_CMP_LIKE"}]}"#,
            ),
            "syscalls[0].args.op",
        ),
    ] {
        let error = compile(&profile(&json)).unwrap_err().to_string();
        assert!(error.contains(&format!("linux.seccomp.{names}")), "{error}");
    }
}

/// The kernel takes the filter and acts on it.
#[test]
fn the_kernel_obeys() {
    let filter = compile(&profile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],"syscalls":[
            {"names":["getppid"],"action":"SCMP_ACT_ERRNO","errnoRet":42},
            {"names":["personality"],"action":"SCMP_ACT_ERRNO","errnoRet":43,
             "args":[{"index":0,"value":4294967295,"op":"SCMP_CMP_EQ"}]}]}"#,
    ))
    .unwrap();
    // A thread of its own: the filter stays with it until it ends.
    std::thread::spawn(move || {
        nix::sys::prctl::set_no_new_privs().unwrap();
        install(&filter).unwrap();
        // SAFETY: takes no argument.
        let parent = unsafe { libc::syscall(libc::SYS_getppid) };
        assert_eq!((parent, errno()), (-1, Some(42)));
        // SAFETY: with this argument it only reads the execution domain.
        let domain = unsafe { libc::syscall(libc::SYS_personality, 0xffff_ffffu64) };
        assert_eq!((domain, errno()), (-1, Some(43)));
        // SAFETY: as above; another argument is not filtered.
        assert_eq!(unsafe { libc::syscall(libc::SYS_personality, 0) }, 0);
    })
    .join()
    .unwrap();
}

fn errno() -> Option<i32> {
    std::io::Error::last_os_error().raw_os_error()
}
