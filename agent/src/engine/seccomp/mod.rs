//! `linux.seccomp` of the OCI runtime spec compiled to a classic BPF filter for seccomp(2).
//!
//! What a profile means is what libseccomp makes of it, because profiles are written against that: conditions of
//! a rule must all hold, unless several name the same argument, then one of them is enough; a rule with
//! conditions goes before one without; system calls of an architecture that is not listed kill the process; and
//! system calls newer than the profile answer ENOSYS, so that C libraries fall back instead of reporting EPERM.

pub(crate) mod bpf;
mod install;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::spec::{Seccomp, SeccompArg, SeccompRule, SpecError};
use bpf::{Comparison, Condition, Entry, Program, Rule};

pub(crate) use install::install;

const FIELD: &str = "linux.seccomp";

/// A compiled profile, ready to install.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Filter {
    /// Instructions, each as `code << 48 | jt << 40 | jf << 32 | k`.
    pub instructions: Vec<u64>,
    /// Flags for seccomp(2), `SECCOMP_SET_MODE_FILTER`.
    pub flags: u32,
}

/// Names and numbers of the system calls of the two architectures a guest's kernel runs.
const X86_64: &str = include_str!("x86_64.tbl");
const I386: &str = include_str!("i386.tbl");

/// The number of a system call.
fn number(table: &str, name: &str) -> Option<u32> {
    table.lines().find_map(|line| {
        let (number, known) = line.split_once(' ')?;
        (known == name).then(|| number.parse().ok()).flatten()
    })
}

/// Compiles a profile.
///
/// # Errors
/// Names the field of an action, operator, flag or architecture that does not exist or is not supported.
pub(crate) fn compile(profile: &Seccomp) -> Result<Filter, SpecError> {
    let default = action(
        &profile.default_action,
        profile.default_errno_ret,
        "defaultAction",
    )?;
    let mut flags = 0;
    for flag in &profile.flags {
        flags |= match flag.as_str() {
            // All threads get the filter; there is one when it is installed.
            "SECCOMP_FILTER_FLAG_TSYNC" => 1,
            "SECCOMP_FILTER_FLAG_LOG" => 2,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => 4,
            other => {
                return Err(SpecError::invalid(
                    format!("{FIELD}.flags"),
                    format!("{other:?} is not supported"),
                ));
            }
        };
    }
    let (mut i386, mut x32) = (false, false);
    for architecture in &profile.architectures {
        match architecture.as_str() {
            "SCMP_ARCH_X86" => i386 = true,
            "SCMP_ARCH_X32" => x32 = true,
            "SCMP_ARCH_X86_64" => {}
            other if OTHER_ARCHITECTURES.contains(&other) => {}
            other => {
                return Err(SpecError::invalid(
                    format!("{FIELD}.architectures"),
                    format!("{other:?} is not an architecture"),
                ));
            }
        }
    }
    let mut program = Program {
        x86_64: entries(profile, X86_64, default)?,
        x32,
        i386: None,
    };
    if i386 {
        program.i386 = Some(entries(profile, I386, default)?);
    }
    let instructions = program
        .assemble()
        .map_err(|reason| SpecError::invalid(FIELD, reason))?;
    Ok(Filter {
        instructions,
        flags,
    })
}

/// Architectures of the specification that this guest never runs, so that their rules never apply.
const OTHER_ARCHITECTURES: &[&str] = &[
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_SH",
    "SCMP_ARCH_SHEB",
];

/// The value a filter returns for an action.
fn action(name: &str, errno: Option<u32>, field: &str) -> Result<u32, SpecError> {
    let data = errno.unwrap_or(libc::EPERM as u32);
    let value = match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => libc::SECCOMP_RET_KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => libc::SECCOMP_RET_KILL_PROCESS,
        "SCMP_ACT_TRAP" => libc::SECCOMP_RET_TRAP,
        // The kernel cuts an errno to 4095.
        "SCMP_ACT_ERRNO" if data > 4095 => {
            return Err(SpecError::invalid(
                format!("{FIELD}.{field}"),
                format!("{data} is not an errno"),
            ));
        }
        "SCMP_ACT_ERRNO" => libc::SECCOMP_RET_ERRNO | data,
        "SCMP_ACT_TRACE" => libc::SECCOMP_RET_TRACE | (data & 0xffff),
        "SCMP_ACT_LOG" => libc::SECCOMP_RET_LOG,
        "SCMP_ACT_ALLOW" => libc::SECCOMP_RET_ALLOW,
        other => {
            return Err(SpecError::invalid(
                format!("{FIELD}.{field}"),
                format!("{other:?} is not supported"),
            ));
        }
    };
    let takes_errno = matches!(name, "SCMP_ACT_ERRNO" | "SCMP_ACT_TRACE");
    if errno.is_some_and(|errno| errno != 0) && !takes_errno {
        return Err(SpecError::invalid(
            format!("{FIELD}.{field}"),
            format!("{name} takes no errno"),
        ));
    }
    Ok(value)
}

/// What happens with each system call of one architecture: sorted, without gaps, from 0 up.
fn entries(profile: &Seccomp, table: &str, default: u32) -> Result<Vec<Entry>, SpecError> {
    let mut calls: BTreeMap<u32, Entry> = BTreeMap::new();
    let mut newest = None;
    for (index, rule) in profile.syscalls.iter().enumerate() {
        let value = action(
            &rule.action,
            rule.errno_ret,
            &format!("syscalls[{index}].action"),
        )?;
        if rule.names.is_empty() {
            return Err(SpecError::invalid(
                format!("{FIELD}.syscalls[{index}].names"),
                "is empty",
            ));
        }
        let alternatives = alternatives(rule, index)?;
        for name in &rule.names {
            let Some(number) = number(table, name) else {
                continue;
            };
            newest = newest.max(Some(number));
            // libseccomp takes no rule that says what the default says.
            if value == default {
                continue;
            }
            let entry = calls.entry(number).or_insert_with(|| Entry {
                first: number,
                rules: Vec::new(),
                otherwise: None,
            });
            if alternatives.is_empty() {
                entry.otherwise.get_or_insert(value);
            } else {
                for conditions in &alternatives {
                    entry.rules.push(Rule {
                        conditions: conditions.clone(),
                        action: value,
                    });
                }
            }
        }
    }
    let denies = default & libc::SECCOMP_RET_ACTION_FULL == libc::SECCOMP_RET_ERRNO
        || default == libc::SECCOMP_RET_TRAP
        || default == libc::SECCOMP_RET_KILL_THREAD
        || default == libc::SECCOMP_RET_KILL_PROCESS;
    let unknown = if denies {
        libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32
    } else {
        default
    };
    let mut entries = Vec::with_capacity(calls.len() * 2);
    let mut push = |entry: Entry| {
        let same = entries.last().is_some_and(|last: &Entry| {
            last.rules.is_empty() && entry.rules.is_empty() && last.otherwise == entry.otherwise
        });
        if !same {
            entries.push(entry);
        }
    };
    let plain = |first, action| Entry {
        first,
        rules: Vec::new(),
        otherwise: Some(action),
    };
    let mut next = 0;
    for (number, mut entry) in calls {
        if number > next {
            push(plain(next, default));
        }
        entry.otherwise.get_or_insert(default);
        push(entry);
        next = number + 1;
    }
    if newest.is_some_and(|newest| newest >= next) {
        push(plain(next, default));
        next = newest.map_or(next, |newest| newest + 1);
    }
    push(plain(
        next,
        if newest.is_some() { unknown } else { default },
    ));
    Ok(entries)
}

/// The conditions of a rule, as alternatives of which one must hold entirely.
fn alternatives(rule: &SeccompRule, index: usize) -> Result<Vec<Vec<Condition>>, SpecError> {
    let conditions = rule
        .args
        .iter()
        .map(|arg| condition(arg, index))
        .collect::<Result<Vec<_>, _>>()?;
    let mut seen = [false; 6];
    let twice = conditions
        .iter()
        .any(|one| std::mem::replace(&mut seen[one.argument as usize], true));
    Ok(if conditions.is_empty() {
        Vec::new()
    } else if twice {
        conditions.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![conditions]
    })
}

fn condition(arg: &SeccompArg, index: usize) -> Result<Condition, SpecError> {
    let field = |name: &str| format!("{FIELD}.syscalls[{index}].args.{name}");
    if arg.index > 5 {
        return Err(SpecError::invalid(
            field("index"),
            format!("{} is above 5", arg.index),
        ));
    }
    let (comparison, value) = match arg.op.as_str() {
        "SCMP_CMP_EQ" => (Comparison::Equal, arg.value),
        "SCMP_CMP_NE" => (Comparison::NotEqual, arg.value),
        "SCMP_CMP_LT" => (Comparison::Less, arg.value),
        "SCMP_CMP_LE" => (Comparison::LessOrEqual, arg.value),
        "SCMP_CMP_GT" => (Comparison::Greater, arg.value),
        "SCMP_CMP_GE" => (Comparison::GreaterOrEqual, arg.value),
        "SCMP_CMP_MASKED_EQ" => (Comparison::MaskedEqual(arg.value), arg.value_two),
        other => {
            return Err(SpecError::invalid(
                field("op"),
                format!("{other:?} is not a comparison"),
            ));
        }
    };
    Ok(Condition {
        argument: arg.index as u8,
        comparison,
        value,
    })
}

#[cfg(test)]
mod tests;
