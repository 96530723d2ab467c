//! The seccomp profile of a container that asks for the runtime's own, in the form of the OCI runtime spec.
//!
//! Everything is refused with EPERM but what ordinary programs use. System calls that a capability guards are
//! allowed with the capability; those that an old kernel lacks are answered with ENOSYS, so that programs fall back.

use serde_json::{Value, json};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// What every program may call, names separated by spaces.
const ALLOWED: &[&str] = &[
    // files and directories
    "access faccessat faccessat2 open openat openat2 creat close close_range read readv pread64 \
     preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek _llseek stat stat64 fstat fstat64 \
     lstat lstat64 newfstatat fstatat64 statx statfs statfs64 fstatfs fstatfs64 chmod fchmod \
     fchmodat fchmodat2 chown chown32 fchown fchown32 fchownat lchown lchown32 link linkat symlink \
     symlinkat unlink unlinkat rename renameat renameat2 mkdir mkdirat rmdir mknod mknodat \
     readlink readlinkat chdir fchdir getcwd getdents getdents64 readdir truncate truncate64 \
     ftruncate ftruncate64 fallocate fadvise64 fadvise64_64 readahead sendfile sendfile64 \
     copy_file_range splice tee vmsplice flock fcntl fcntl64 ioctl dup dup2 dup3 umask utime \
     utimes utimensat utimensat_time64 futimesat fsync fdatasync sync syncfs sync_file_range \
     getxattr lgetxattr fgetxattr getxattrat setxattr lsetxattr fsetxattr setxattrat listxattr \
     llistxattr flistxattr listxattrat removexattr lremovexattr fremovexattr removexattrat \
     name_to_handle_at inotify_init inotify_init1 inotify_add_watch inotify_rm_watch fanotify_mark \
     cachestat file_getattr file_setattr",
    // waiting and events
    "poll ppoll ppoll_time64 select _newselect pselect6 pselect6_time64 epoll_create epoll_create1 \
     epoll_ctl epoll_ctl_old epoll_wait epoll_wait_old epoll_pwait epoll_pwait2 eventfd eventfd2 \
     signalfd signalfd4 pipe pipe2 io_setup io_destroy io_submit io_cancel io_getevents \
     io_pgetevents io_pgetevents_time64",
    // memory
    "brk mmap mmap2 munmap mremap mprotect madvise mincore mlock mlock2 mlockall munlock \
     munlockall msync remap_file_pages memfd_create memfd_secret map_shadow_stack mseal pkey_alloc \
     pkey_free pkey_mprotect process_mrelease membarrier",
    // processes and threads
    "fork vfork execve execveat exit exit_group wait4 waitid waitpid kill tkill tgkill pidfd_open \
     pidfd_send_signal getpid getppid gettid getpgid getpgrp setpgid getsid setsid set_tid_address \
     set_robust_list get_robust_list rseq futex futex_time64 futex_wait futex_wake futex_requeue \
     futex_waitv prctl arch_prctl modify_ldt set_thread_area get_thread_area getcpu sched_yield \
     sched_getaffinity sched_setaffinity sched_getattr sched_setattr sched_getparam sched_setparam \
     sched_getscheduler sched_setscheduler sched_get_priority_max sched_get_priority_min \
     sched_rr_get_interval sched_rr_get_interval_time64 getpriority setpriority ioprio_get \
     ioprio_set getrlimit ugetrlimit setrlimit prlimit64 getrusage times restart_syscall seccomp \
     landlock_create_ruleset landlock_add_rule landlock_restrict_self",
    // identity
    "getuid getuid32 geteuid geteuid32 getgid getgid32 getegid getegid32 getresuid getresuid32 \
     getresgid getresgid32 getgroups getgroups32 setuid setuid32 setgid setgid32 setreuid \
     setreuid32 setregid setregid32 setresuid setresuid32 setresgid setresgid32 setfsuid \
     setfsuid32 setfsgid setfsgid32 setgroups setgroups32 capget capset",
    // signals
    "rt_sigaction rt_sigprocmask rt_sigpending rt_sigqueueinfo rt_sigreturn rt_sigsuspend \
     rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack sigreturn sigprocmask \
     pause alarm",
    // time
    "time gettimeofday clock_gettime clock_gettime64 clock_getres clock_getres_time64 \
     clock_nanosleep clock_nanosleep_time64 nanosleep getitimer setitimer timer_create \
     timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 \
     timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 adjtimex \
     clock_adjtime clock_adjtime64",
    // sockets and other IPC
    "socketcall socketpair bind listen accept accept4 connect getsockname getpeername getsockopt \
     setsockopt shutdown send sendto sendmsg sendmmsg recv recvfrom recvmsg recvmmsg \
     recvmmsg_time64 ipc msgctl msgget msgrcv msgsnd semctl semget semop semtimedop \
     semtimedop_time64 shmat shmctl shmdt shmget mq_open mq_unlink mq_notify mq_getsetattr \
     mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64",
    // the rest
    "uname sysinfo getrandom ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd",
];

/// What a capability allows beyond that, written likewise.
const BY_CAPABILITY: &[(&str, &str)] = &[
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount \
         mount_setattr move_mount open_tree listmount statmount perf_event_open quotactl \
         quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "delete_module init_module finit_module"),
    ("SYS_PACCT", "acct"),
    ("SYS_RAWIO", "iopl ioperm"),
    (
        "SYS_TIME",
        "settimeofday stime clock_settime clock_settime64",
    ),
    ("SYS_TTY_CONFIG", "vhangup"),
    (
        "SYS_NICE",
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node migrate_pages move_pages",
    ),
    ("SYSLOG", "syslog"),
    ("BPF", "bpf"),
    ("PERFMON", "perf_event_open"),
];

/// The namespace flags of clone(2): CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
const NAMESPACE_FLAGS: u64 =
    0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000;

/// The address family of virtual machine sockets, by which the guest's agent speaks with the host.
const AF_VSOCK: u64 = 40;

/// The profile for a process with these capabilities (names without CAP_).
pub fn default_profile(capabilities: &[&str]) -> Value {
    let has = |name: &str| capabilities.contains(&name);
    let mut rules = vec![allow(&ALLOWED.join(" "))];
    for (capability, names) in BY_CAPABILITY {
        if has(capability) {
            rules.push(allow(names));
        }
    }
    if !has("SYS_ADMIN") {
        rules.push(json!({
            "names": ["clone"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{ "index": 0, "value": NAMESPACE_FLAGS, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }],
        }));
        // Its flags are in memory, where a filter cannot see them; with ENOSYS programs use clone.
        rules.push(json!({
            "names": ["clone3"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": ENOSYS,
        }));
    }
    // A container talks to the host over its network, never over the agent's channel.
    rules.push(json!({
        "names": ["socket"],
        "action": "SCMP_ACT_ALLOW",
        "args": [{ "index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_NE" }],
    }));
    for persona in [0x0u64, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff] {
        rules.push(json!({
            "names": ["personality"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{ "index": 0, "value": persona, "op": "SCMP_CMP_EQ" }],
        }));
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    })
}

fn allow(names: &str) -> Value {
    let names: Vec<_> = names.split_whitespace().collect();
    json!({ "names": names, "action": "SCMP_ACT_ALLOW" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(profile: &Value) -> Vec<String> {
        profile["syscalls"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|rule| rule["action"] == "SCMP_ACT_ALLOW" && rule.get("args").is_none())
            .flat_map(|rule| rule["names"].as_array().unwrap())
            .map(|name| name.as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn capabilities_open_what_they_guard() {
        let plain = names(&default_profile(&["CHOWN"]));
        for refused in [
            "mount",
            "bpf",
            "reboot",
            "unshare",
            "keyctl",
            "io_uring_setup",
            "userfaultfd",
            "chroot",
        ] {
            assert!(!plain.contains(&refused.to_owned()), "{refused}");
        }
        let admin = names(&default_profile(&["SYS_ADMIN", "SYS_CHROOT"]));
        for allowed in ["mount", "unshare", "clone3", "chroot"] {
            assert!(admin.contains(&allowed.to_owned()), "{allowed}");
        }
    }

    #[test]
    fn no_call_is_listed_twice() {
        let all = ALLOWED.join(" ");
        let mut all: Vec<_> = all.split_whitespace().collect();
        assert!(all.len() > 300);
        all.sort_unstable();
        let before = all.len();
        all.dedup();
        assert_eq!(all.len(), before);
    }
}
