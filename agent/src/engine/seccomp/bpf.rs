//! An assembler for the filters: a tree of comparisons of the number, conditions at its leaves.

/// `AUDIT_ARCH_X86_64` of linux/audit.h.
pub(super) const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// `AUDIT_ARCH_I386` of linux/audit.h.
pub(super) const AUDIT_ARCH_I386: u32 = 0x4000_0003;
/// Bit of the number that marks a system call of the x32 ABI.
const X32_BIT: u32 = 0x4000_0000;
/// What the kernel takes (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JEQ: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JGT: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const JGE: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

// Offsets in struct seccomp_data.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCHITECTURE: u32 = 4;
const OFFSET_ARGUMENTS: u32 = 16;

/// How an argument is compared with a value, unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    /// Equal.
    Equal,
    /// Not equal.
    NotEqual,
    /// Below.
    Less,
    /// Below or equal.
    LessOrEqual,
    /// Above.
    Greater,
    /// Above or equal.
    GreaterOrEqual,
    /// Equal under this mask.
    MaskedEqual(u64),
}

/// A condition on one argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Condition {
    /// Which, 0 to 5.
    pub argument: u8,
    /// How.
    pub comparison: Comparison,
    /// With what.
    pub value: u64,
}

/// An action if all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    /// The conditions.
    pub conditions: Vec<Condition>,
    /// What the filter returns.
    pub action: u32,
}

/// What happens from one number up to the next entry's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// First number.
    pub first: u32,
    /// Tried in order.
    pub rules: Vec<Rule>,
    /// If none of them matched.
    pub otherwise: Option<u32>,
}

/// A whole filter.
#[derive(Debug)]
pub(super) struct Program {
    /// Entries of the 64-bit system calls, sorted, the first from 0.
    pub x86_64: Vec<Entry>,
    /// Whether the same entries also serve x32.
    pub x32: bool,
    /// Entries of the 32-bit system calls; none: they kill the process.
    pub i386: Option<Vec<Entry>>,
}

/// One instruction: `code << 48 | jt << 40 | jf << 32 | k`.
fn instruction(code: u16, jump_true: u8, jump_false: u8, k: u32) -> u64 {
    u64::from(code) << 48 | u64::from(jump_true) << 40 | u64::from(jump_false) << 32 | u64::from(k)
}

fn statement(code: u16, k: u32) -> u64 {
    instruction(code, 0, 0, k)
}

impl Program {
    /// The instructions.
    ///
    /// # Errors
    /// A sentence, if there are more than the kernel takes or a rule has too many conditions.
    pub fn assemble(&self) -> Result<Vec<u64>, String> {
        let mut out = vec![statement(LOAD, OFFSET_ARCHITECTURE)];
        let mut wide = vec![statement(LOAD, OFFSET_NUMBER)];
        if self.x32 {
            wide.push(statement(AND, !X32_BIT));
        } else {
            wide.push(instruction(JGE, 0, 1, X32_BIT));
            wide.push(statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS));
        }
        wide.extend(tree(&self.x86_64)?);
        when_equal(&mut out, AUDIT_ARCH_X86_64, &wide);
        if let Some(entries) = &self.i386 {
            let mut narrow = vec![statement(LOAD, OFFSET_NUMBER)];
            narrow.extend(tree(entries)?);
            when_equal(&mut out, AUDIT_ARCH_I386, &narrow);
        }
        out.push(statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS));
        if out.len() > MAX_INSTRUCTIONS {
            return Err(format!(
                "the filter needs {} instructions, the kernel takes {MAX_INSTRUCTIONS}",
                out.len()
            ));
        }
        Ok(out)
    }
}

/// Runs `body`, which returns, if the accumulator is `value`.
fn when_equal(out: &mut Vec<u64>, value: u32, body: &[u64]) {
    // A conditional jump reaches 255 instructions; an unconditional one reaches all.
    out.push(instruction(JEQ, 1, 0, value));
    out.push(statement(JUMP, body.len() as u32));
    out.extend_from_slice(body);
}

/// Code that returns what `entries` say about the number in the accumulator.
fn tree(entries: &[Entry]) -> Result<Vec<u64>, String> {
    if let [entry] = entries {
        return leaf(entry);
    }
    let (below, above) = entries.split_at(entries.len() / 2);
    let (below_code, above_code) = (tree(below)?, tree(above)?);
    let mut out = Vec::with_capacity(below_code.len() + above_code.len() + 2);
    match u8::try_from(below_code.len()) {
        Ok(distance) => out.push(instruction(JGE, distance, 0, above[0].first)),
        Err(_) => {
            out.push(instruction(JGE, 0, 1, above[0].first));
            out.push(statement(JUMP, below_code.len() as u32));
        }
    }
    out.extend(below_code);
    out.extend(above_code);
    Ok(out)
}

/// Code of one entry; always ends in a return.
fn leaf(entry: &Entry) -> Result<Vec<u64>, String> {
    let mut out = Vec::new();
    for rule in &entry.rules {
        let mut tests = Vec::new();
        for condition in &rule.conditions {
            tests.extend(test(condition));
        }
        // A failed test jumps behind the return that follows the last one.
        let end = tests.len() + 1;
        for (at, one) in tests.into_iter().enumerate() {
            out.push(match one {
                Test::Statement(code) => code,
                Test::Jump {
                    code,
                    value,
                    when_true,
                    when_false,
                } => {
                    let distance = |target: Target| match target {
                        Target::Skip(count) => Ok(count),
                        Target::Fail => u8::try_from(end - at - 1)
                            .map_err(|_| "a rule has too many conditions".to_owned()),
                    };
                    instruction(code, distance(when_true)?, distance(when_false)?, value)
                }
            });
        }
        out.push(statement(RETURN, rule.action));
    }
    let otherwise = entry.otherwise.unwrap_or(libc::SECCOMP_RET_KILL_PROCESS);
    out.push(statement(RETURN, otherwise));
    Ok(out)
}

enum Target {
    /// Leave out that many instructions and go on.
    Skip(u8),
    /// The rule does not match.
    Fail,
}

enum Test {
    Statement(u64),
    Jump {
        code: u16,
        value: u32,
        when_true: Target,
        when_false: Target,
    },
}

fn jump(code: u16, value: u32, when_true: Target, when_false: Target) -> Test {
    Test::Jump {
        code,
        value,
        when_true,
        when_false,
    }
}

/// Code that goes on if a condition holds. Arguments are 64 bits wide and the machine 32.
fn test(condition: &Condition) -> Vec<Test> {
    use Target::{Fail, Skip};
    let low_offset = OFFSET_ARGUMENTS + 8 * u32::from(condition.argument);
    let load_low = || Test::Statement(statement(LOAD, low_offset));
    let load_high = || Test::Statement(statement(LOAD, low_offset + 4));
    let (low, high) = (condition.value as u32, (condition.value >> 32) as u32);
    match condition.comparison {
        Comparison::Equal => vec![
            load_high(),
            jump(JEQ, high, Skip(0), Fail),
            load_low(),
            jump(JEQ, low, Skip(0), Fail),
        ],
        Comparison::NotEqual => vec![
            load_high(),
            jump(JEQ, high, Skip(0), Skip(2)),
            load_low(),
            jump(JEQ, low, Fail, Skip(0)),
        ],
        Comparison::Greater | Comparison::GreaterOrEqual => {
            let code = match condition.comparison {
                Comparison::Greater => JGT,
                _ => JGE,
            };
            vec![
                load_high(),
                jump(JGT, high, Skip(3), Skip(0)),
                jump(JEQ, high, Skip(0), Fail),
                load_low(),
                jump(code, low, Skip(0), Fail),
            ]
        }
        Comparison::Less | Comparison::LessOrEqual => {
            let code = match condition.comparison {
                Comparison::Less => JGE,
                _ => JGT,
            };
            vec![
                load_high(),
                jump(JGT, high, Fail, Skip(0)),
                jump(JEQ, high, Skip(0), Skip(2)),
                load_low(),
                jump(code, low, Fail, Skip(0)),
            ]
        }
        Comparison::MaskedEqual(mask) => vec![
            load_high(),
            Test::Statement(statement(AND, (mask >> 32) as u32)),
            jump(JEQ, high, Skip(0), Fail),
            load_low(),
            Test::Statement(statement(AND, mask as u32)),
            jump(JEQ, low, Skip(0), Fail),
        ],
    }
}
