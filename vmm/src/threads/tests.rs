//! The filters: what they let through by what the kernel's interpreter would say, and that the kernel says the same.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use seccompiler::sock_filter;

use super::filters::{KINDS, Kind, allowed, install, program};

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
/// More than any kernel has.
const CALLS: i64 = 600;

/// Runs a classic BPF program, of which filters use some instructions (Linux, Documentation/networking/filter.rst).
fn verdict(program: &[sock_filter], call: i64, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend((call as u32).to_ne_bytes());
    data.extend(0xc000_003eu32.to_ne_bytes()); // AUDIT_ARCH_X86_64
    data.extend(0u64.to_ne_bytes());
    arguments.iter().for_each(|a| data.extend(a.to_ne_bytes()));
    let (mut at, mut accumulator) = (0, 0u32);
    loop {
        let instruction = &program[at];
        let (jt, jf, k) = (instruction.jt, instruction.jf, instruction.k);
        let jump = |taken: bool| usize::from(if taken { jt } else { jf });
        at += 1;
        match instruction.code {
            0x20 => {
                let word = &data[k as usize..k as usize + 4];
                accumulator = u32::from_ne_bytes(word.try_into().unwrap());
            }
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += jump(accumulator == k),
            0x25 => at += jump(accumulator > k),
            0x35 => at += jump(accumulator >= k),
            0x45 => at += jump(accumulator & k != 0),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

#[test]
fn each_filter_allows_its_list_and_nothing_else() {
    let constrained = [
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_fcntl,
        libc::SYS_ioctl,
        libc::SYS_socket,
    ];
    for kind in KINDS.into_iter().chain([Kind::Starter]) {
        let program = program(kind).unwrap();
        let list: BTreeSet<i64> = allowed(kind).into_iter().collect();
        assert!(list.len() > 20, "{kind:?} is nearly empty");
        for call in 0..CALLS {
            let discards = matches!(kind, Kind::Balloon | Kind::Mem);
            let constrained =
                constrained.contains(&call) || (discards && call == libc::SYS_madvise);
            let want = list.contains(&call) && !constrained;
            // Arguments that no rule asks for.
            let got = verdict(&program, call, [u64::MAX; 6]);
            assert_eq!(
                got,
                if want { ALLOW } else { KILL },
                "{kind:?}, call {call}"
            );
        }
    }
}

#[test]
fn no_kind_runs_programs_reaches_the_network_or_makes_code() {
    let never = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_writev,
        libc::SYS_bpf,
        libc::SYS_mount,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_kill,
        libc::SYS_pidfd_getfd,
        libc::SYS_io_uring_setup,
        libc::SYS_userfaultfd,
        libc::SYS_open_by_handle_at,
    ];
    for kind in KINDS.into_iter().chain([Kind::Starter]) {
        let program = program(kind).unwrap();
        for call in never {
            assert_eq!(
                verdict(&program, call, [0; 6]),
                KILL,
                "{kind:?}, call {call}"
            );
        }
        let inet = [libc::AF_INET as u64, 1, 0, 0, 0, 0];
        assert_eq!(verdict(&program, libc::SYS_socket, inet), KILL, "{kind:?}");
        for prot in [libc::PROT_EXEC, libc::PROT_EXEC | libc::PROT_WRITE] {
            let arguments = [0, 4096, prot as u64, 0, 0, 0];
            for call in [libc::SYS_mmap, libc::SYS_mprotect] {
                assert_eq!(verdict(&program, call, arguments), KILL, "{kind:?}");
            }
        }
        let data = [0, 4096, libc::PROT_READ as u64, 0, 0, 0];
        assert_eq!(verdict(&program, libc::SYS_mmap, data), ALLOW, "{kind:?}");
    }
    for kind in KINDS {
        for call in [
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_seccomp,
            libc::SYS_prctl,
        ] {
            assert!(!allowed(kind).contains(&call), "{kind:?} starts threads");
        }
        let files = allowed(kind).contains(&libc::SYS_openat);
        assert_eq!(files, kind == Kind::Fs, "{kind:?} opens files");
    }
}

#[test]
fn ioctls_are_named_one_by_one() {
    let ask = |kind, request| {
        verdict(
            &program(kind).unwrap(),
            libc::SYS_ioctl,
            [3, request, 0, 0, 0, 0],
        )
    };
    assert_eq!(ask(Kind::Vcpu, 0xae80), ALLOW, "KVM_RUN");
    assert_eq!(ask(Kind::Vcpu, 0xae01), KILL, "KVM_CREATE_VM");
    assert_eq!(ask(Kind::Vsock, libc::FIONBIO), ALLOW);
    assert_eq!(ask(Kind::Vsock, libc::TIOCSTI), KILL);
    assert_eq!(ask(Kind::Fs, libc::FIONBIO), KILL);
    for request in crate::virtio::net::VHOST_REQUESTS {
        assert_eq!(ask(Kind::Net, request), ALLOW, "{request:#x}");
        assert_eq!(ask(Kind::Vcpu, request), KILL, "{request:#x}");
    }
    assert_eq!(ask(Kind::Net, 0xaf02), KILL, "VHOST_RESET_OWNER");
    assert_eq!(ask(Kind::Net, 0x4008_af04), KILL, "VHOST_SET_LOG_BASE");
}

#[test]
fn what_a_guest_gives_back_is_only_thrown_away() {
    for kind in [Kind::Balloon, Kind::Mem] {
        let program = program(kind).unwrap();
        for (advice, want) in [
            (libc::MADV_DONTNEED, ALLOW),
            (libc::MADV_REMOVE, KILL),
            (libc::MADV_FREE, KILL),
            (libc::MADV_HWPOISON, KILL),
            (libc::MADV_MERGEABLE, KILL),
        ] {
            let arguments = [0, 4096, advice as u64, 0, 0, 0];
            let got = verdict(&program, libc::SYS_madvise, arguments);
            assert_eq!(got, want, "{kind:?}, advice {advice}");
        }
    }
}

/// What becomes of a process that installs the filter of `kind` and then runs `then`.
fn end_of(kind: Kind, then: impl FnOnce()) -> WaitStatus {
    // SAFETY: the child makes system calls and allocates; other tests' threads may hold the allocator's lock at the
    // fork, which glibc's fork sees to.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let installed = install(kind).is_ok();
            then();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(if installed { 0 } else { 9 }) }
        }
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
    }
}

#[test]
fn the_kernel_ends_who_breaks_a_filter() {
    for kind in KINDS {
        let end = end_of(kind, || {});
        assert!(matches!(end, WaitStatus::Exited(_, 0)), "{kind:?}: {end:?}");
        let end = end_of(kind, || {
            // SAFETY: takes no memory.
            unsafe { libc::syscall(libc::SYS_unshare, 0) };
        });
        assert!(
            matches!(end, WaitStatus::Signaled(_, Signal::SIGSYS, _)),
            "{kind:?}: {end:?}"
        );
    }
}
