//! A guest with no kernel: the processor runs a list of steps that a test wrote, and nothing else. It is the worst
//! guest there can be, since nobody stands between it and the devices.
//!
//! The list is made on the host ([`Program`]) and put into an ELF file behind a small interpreter, which is all the
//! code that runs in the machine.

use std::arch::global_asm;

/// Where the file is loaded and entered.
const LOAD: u64 = 16 << 20;
/// Where a program may have its rings and buffers; to the end of the machine's memory.
pub const FREE: u64 = 32 << 20;
/// The machine's memory.
pub const MEMORY_MIB: u32 = 64;
/// COM1.
const SERIAL: u64 = 0x3f8;
/// Port and value by which the machine is switched off (ACPI's sleep control register).
const POWER_OFF: (u64, u64) = (0x600, 5 << 2 | 1 << 5);

/// What the interpreter can do. A step is the number and three operands a, b and c, of 8 bytes each.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
enum Op {
    /// Stops for good.
    Halt = 0,
    /// Writes b to address a.
    Write8 = 1,
    Write16 = 2,
    Write32 = 3,
    Write64 = 4,
    /// Writes b to port a.
    Out8 = 5,
    /// Reads address a and prints it on the console, as eight digits and a line's end.
    Show32 = 6,
    /// Waits until the 16 bits at address a are b, at most c turns.
    Wait16 = 7,
    /// Goes a bytes back, b times in all; c is b.
    Repeat = 8,
    /// Adds b to the 16 bits at address a.
    Add16 = 9,
    /// Fills c bytes from address a with b.
    Fill = 10,
    /// Writes c random words to random places: address a, plus any of the mask b.
    Storm = 11,
    /// Copies c bytes from b to a.
    Copy = 12,
    /// Spins for c turns.
    Spin = 13,
    /// Writes b to port a, c times.
    Out8Many = 14,
    /// Waits until the 16 bits at a and at b are the same, at most c turns.
    WaitSame = 15,
}

global_asm!(
    ".pushsection .rodata.hostile_guest, \"a\"",
    ".balign 16",
    ".globl hostile_guest_begin",
    "hostile_guest_begin:",
    "cli",
    "cld",
    "lea rsi, [rip + .Lhg_program]",
    "movabs r15, 0x9e3779b97f4a7c15",
    ".Lhg_next:",
    "mov rax, [rsi]",
    "mov rdi, [rsi + 8]",
    "mov rdx, [rsi + 16]",
    "mov rcx, [rsi + 24]",
    "add rsi, 32",
    "cmp eax, 1",
    "je .Lhg_write8",
    "cmp eax, 2",
    "je .Lhg_write16",
    "cmp eax, 3",
    "je .Lhg_write32",
    "cmp eax, 4",
    "je .Lhg_write64",
    "cmp eax, 5",
    "je .Lhg_out8",
    "cmp eax, 6",
    "je .Lhg_show32",
    "cmp eax, 7",
    "je .Lhg_wait16",
    "cmp eax, 8",
    "je .Lhg_repeat",
    "cmp eax, 9",
    "je .Lhg_add16",
    "cmp eax, 10",
    "je .Lhg_fill",
    "cmp eax, 11",
    "je .Lhg_storm",
    "cmp eax, 12",
    "je .Lhg_copy",
    "cmp eax, 13",
    "je .Lhg_spin",
    "cmp eax, 14",
    "je .Lhg_out8_many",
    "cmp eax, 15",
    "je .Lhg_wait_same",
    ".Lhg_halt:",
    "hlt",
    "jmp .Lhg_halt",
    ".Lhg_write8:",
    "mov [rdi], dl",
    "jmp .Lhg_next",
    ".Lhg_write16:",
    "mov [rdi], dx",
    "jmp .Lhg_next",
    ".Lhg_write32:",
    "mov [rdi], edx",
    "jmp .Lhg_next",
    ".Lhg_write64:",
    "mov [rdi], rdx",
    "jmp .Lhg_next",
    ".Lhg_out8:",
    "mov eax, edx",
    "mov edx, edi",
    "out dx, al",
    "jmp .Lhg_next",
    ".Lhg_out8_many:",
    "mov eax, edx",
    "mov edx, edi",
    ".Lhg_out8_again:",
    "out dx, al",
    "dec rcx",
    "jnz .Lhg_out8_again",
    "jmp .Lhg_next",
    ".Lhg_show32:",
    "mov ebx, [rdi]",
    "mov ecx, 8",
    "mov edx, 0x3f8",
    ".Lhg_digit:",
    "rol ebx, 4",
    "mov eax, ebx",
    "and eax, 15",
    "add eax, 48",
    "cmp eax, 58",
    "jb .Lhg_decimal",
    "add eax, 39",
    ".Lhg_decimal:",
    "out dx, al",
    "dec ecx",
    "jnz .Lhg_digit",
    "mov eax, 10",
    "out dx, al",
    "jmp .Lhg_next",
    ".Lhg_wait16:",
    "cmp [rdi], dx",
    "je .Lhg_next",
    "pause",
    "dec rcx",
    "jnz .Lhg_wait16",
    "jmp .Lhg_next",
    ".Lhg_wait_same:",
    "movzx eax, word ptr [rdx]",
    "cmp [rdi], ax",
    "je .Lhg_next",
    "pause",
    "dec rcx",
    "jnz .Lhg_wait_same",
    "jmp .Lhg_next",
    ".Lhg_repeat:",
    "dec qword ptr [rsi - 16]",
    "jz .Lhg_repeated",
    "sub rsi, rdi",
    "jmp .Lhg_next",
    ".Lhg_repeated:",
    "mov [rsi - 16], rcx",
    "jmp .Lhg_next",
    ".Lhg_add16:",
    "add [rdi], dx",
    "jmp .Lhg_next",
    ".Lhg_fill:",
    "mov eax, edx",
    "rep stosb",
    "jmp .Lhg_next",
    ".Lhg_storm:",
    "mov rax, r15",
    "shl rax, 13",
    "xor r15, rax",
    "mov rax, r15",
    "shr rax, 7",
    "xor r15, rax",
    "mov rax, r15",
    "shl rax, 17",
    "xor r15, rax",
    "mov rbx, r15",
    "and rbx, rdx",
    "and rbx, -4",
    "mov rax, r15",
    "shr rax, 32",
    // Every second word is small: counts, indices and states are.
    "bt r15, 30",
    "jc .Lhg_large",
    "and eax, 15",
    ".Lhg_large:",
    "mov [rdi + rbx], eax",
    "dec rcx",
    "jnz .Lhg_storm",
    "jmp .Lhg_next",
    ".Lhg_copy:",
    "mov r13, rsi",
    "mov rsi, rdx",
    "rep movsb",
    "mov rsi, r13",
    "jmp .Lhg_next",
    ".Lhg_spin:",
    "pause",
    "dec rcx",
    "jnz .Lhg_spin",
    "jmp .Lhg_next",
    ".balign 16",
    ".Lhg_program:",
    ".globl hostile_guest_end",
    "hostile_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static hostile_guest_begin: u8;
    static hostile_guest_end: u8;
}

fn interpreter() -> &'static [u8] {
    // SAFETY: both labels are in one section, which is there for as long as the program is, the first before the second.
    unsafe {
        let begin = &raw const hostile_guest_begin;
        let end = &raw const hostile_guest_end;
        std::slice::from_raw_parts(begin, end.offset_from_unsigned(begin))
    }
}

/// The steps of a guest.
#[derive(Clone, Debug, Default)]
pub struct Program(Vec<[u64; 4]>);

impl Program {
    fn step(&mut self, op: Op, a: u64, b: u64, c: u64) -> &mut Self {
        self.0.push([op as u64, a, b, c]);
        self
    }

    pub fn write8(&mut self, at: u64, value: u8) -> &mut Self {
        self.step(Op::Write8, at, value.into(), 0)
    }

    pub fn write16(&mut self, at: u64, value: u16) -> &mut Self {
        self.step(Op::Write16, at, value.into(), 0)
    }

    pub fn write32(&mut self, at: u64, value: u32) -> &mut Self {
        self.step(Op::Write32, at, value.into(), 0)
    }

    pub fn write64(&mut self, at: u64, value: u64) -> &mut Self {
        self.step(Op::Write64, at, value, 0)
    }

    /// Puts these bytes there.
    pub fn put(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        for (i, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write64(at + 8 * i as u64, u64::from_le_bytes(word));
        }
        self
    }

    pub fn fill(&mut self, at: u64, byte: u8, count: u64) -> &mut Self {
        self.step(Op::Fill, at, byte.into(), count)
    }

    pub fn copy(&mut self, from: u64, to: u64, count: u64) -> &mut Self {
        self.step(Op::Copy, to, from, count)
    }

    pub fn add16(&mut self, at: u64, value: u16) -> &mut Self {
        self.step(Op::Add16, at, value.into(), 0)
    }

    /// Random words at random places: `at` plus any of `mask`.
    pub fn storm(&mut self, at: u64, mask: u64, count: u64) -> &mut Self {
        self.step(Op::Storm, at, mask, count)
    }

    pub fn spin(&mut self, turns: u64) -> &mut Self {
        self.step(Op::Spin, 0, 0, turns)
    }

    /// Waits for a value, for some seconds.
    pub fn wait16(&mut self, at: u64, value: u16) -> &mut Self {
        self.step(Op::Wait16, at, value.into(), 100_000_000)
    }

    /// The same, not for long: what is waited for need not come.
    pub fn wait16_briefly(&mut self, at: u64, value: u16) -> &mut Self {
        self.step(Op::Wait16, at, value.into(), 200_000)
    }

    /// Waits until two numbers are the same, for some seconds.
    pub fn wait_same(&mut self, one: u64, other: u64) -> &mut Self {
        self.step(Op::WaitSame, one, other, 100_000_000)
    }

    /// Writes a byte to a port, so many times.
    pub fn out8(&mut self, port: u64, value: u8, times: u64) -> &mut Self {
        self.step(Op::Out8Many, port, value.into(), times)
    }

    /// Prints a word of memory or of a device.
    pub fn show(&mut self, at: u64) -> &mut Self {
        self.step(Op::Show32, at, 0, 0)
    }

    pub fn say(&mut self, text: &str) -> &mut Self {
        for byte in text.bytes() {
            self.step(Op::Out8, SERIAL, byte.into(), 0);
        }
        self
    }

    /// Does these steps so many times.
    pub fn repeat(&mut self, times: u64, body: impl FnOnce(&mut Self)) -> &mut Self {
        let begin = self.0.len();
        body(self);
        // The step of the repetition itself is behind the interpreter by then.
        let back = 32 * (self.0.len() - begin + 1) as u64;
        self.step(Op::Repeat, back, times, times)
    }

    /// The kernel file of this guest, which says that it is done and switches the machine off at its end.
    pub fn kernel(&self) -> Vec<u8> {
        let mut all = self.clone();
        all.say("done\n");
        all.step(Op::Out8, POWER_OFF.0, POWER_OFF.1, 0);
        all.step(Op::Halt, 0, 0, 0);
        let mut image = interpreter().to_vec();
        image.extend(all.0.iter().flatten().flat_map(|word| word.to_le_bytes()));
        assert!(
            LOAD + (image.len() as u64) < FREE,
            "the program is too long"
        );
        elf(&image)
    }
}

/// A 64-bit ELF file with one segment (System V ABI, chapters 4 and 5).
fn elf(image: &[u8]) -> Vec<u8> {
    const OFFSET: u64 = 0x1000;
    let size = image.len() as u64;
    let mut file = Vec::new();
    // Class 64, little-endian, version 1.
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // An executable for x86-64, version 1.
    file.extend([2u16, 62].map(u16::to_le_bytes).concat());
    file.extend(1u32.to_le_bytes());
    // Entry, program headers, section headers.
    file.extend([LOAD, 64, 0].map(u64::to_le_bytes).concat());
    file.extend(0u32.to_le_bytes());
    // Sizes and numbers of headers.
    file.extend([64u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    // To be loaded; readable, writable, executable.
    file.extend([1u32, 7].map(u32::to_le_bytes).concat());
    file.extend(
        [OFFSET, LOAD, LOAD, size, size, 0x1000]
            .map(u64::to_le_bytes)
            .concat(),
    );
    file.resize(OFFSET as usize, 0);
    file.extend(image);
    file
}
