//! The last steps before a process's program: its user, rights and limits.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{Mode, fstat, umask};
use nix::unistd::{Gid, Uid, fchown, setgroups, setresgid, setresuid};

use super::capabilities::{self, Sets};
use super::console::Terminal;
use super::{During, Step, hooks, stage, user};
use crate::engine::channel::{Channel, Message};
use crate::engine::plan::State;
use crate::engine::seccomp::{self, Filter};
use crate::engine::spec::{Hook, Personality, Process};
use crate::engine::sys;

/// Searched for programs when the environment has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a process gets from its container.
pub(super) struct Ending<'a> {
    /// System call filter.
    pub filter: Option<&'a Filter>,
    /// Execution domain.
    pub personality: Option<&'a Personality>,
    /// Run right before the program.
    pub hooks: &'a [Hook],
    /// For them.
    pub state: Option<&'a State>,
    /// Its terminal.
    pub terminal: Option<Terminal>,
}

/// Prepares the calling process, reports that it is ready, waits for the start, and executes the program.
pub(super) fn execute(
    channel: &Channel,
    process: &Process,
    ending: Ending<'_>,
) -> Result<Infallible, Step> {
    let process = &Process {
        user: user::resolve(&process.user, Path::new("/"))
            .map_err(|why| Step::other("find process.user.username", why))?,
        ..process.clone()
    };
    let user = &process.user;
    match &ending.terminal {
        Some(terminal) => {
            terminal.give_to(user.uid)?;
            terminal.take()?;
        }
        None => own_streams(user.uid),
    }
    if let Some(wanted) = ending.personality {
        let domain =
            personality(wanted).map_err(|why| Step::other("set linux.personality", why))?;
        // SAFETY: takes a number.
        if unsafe { libc::personality(domain) } < 0 {
            return Err(Step::new(
                "set linux.personality",
                io::Error::last_os_error(),
            ));
        }
    }
    let sets = match &process.capabilities {
        Some(names) => Sets::resolve(names)
            .map_err(|error| Step::other("set process.capabilities", error.to_string()))?,
        None => Sets::default(),
    };
    let entered = enter(&process.cwd);
    sets.drop_bounding()?;
    change_user(process)?;
    // A directory that root of the container may not enter (a share, say) may still be the user's own.
    entered
        .or_else(|_| nix::unistd::chdir(process.cwd.as_str()).map_err(io::Error::from))
        .and_then(|()| inside())
        .during(|| format!("enter process.cwd {}", process.cwd))?;

    let environment = environment(process)?;
    let program = find(process)?;
    let strings = |list: &[String]| {
        list.iter()
            .map(|one| CString::new(one.as_str()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| Step::other("read the plan", "it has a NUL byte in a string"))
    };
    let arguments = strings(&process.args)?;
    let environment = strings(&environment)?;
    let c_program = strings(std::slice::from_ref(&program))?.remove(0);
    umask(Mode::from_bits_truncate(user.umask.unwrap_or(0o022)));
    for limit in &process.rlimits {
        let name = &limit.kind;
        let resource = rlimit(name)
            .ok_or_else(|| Step::other(format!("set {name}"), "it is not a resource limit"))?;
        sys::set_limit(resource, limit.soft, limit.hard).during(|| {
            format!(
                "set {name} of process.rlimits to {} and {}",
                limit.soft, limit.hard
            )
        })?;
    }

    let (master, slave) = match ending.terminal {
        Some(terminal) => (Some(terminal.master), Some(terminal.slave)),
        None => (None, None),
    };
    let ready = Message::Ready(master);
    channel
        .send(&ready)
        .during(|| "report that the process is ready".into())?;
    // A copy of the terminal's other end here would keep the terminal alive after the agent has closed its own.
    drop((ready, slave));
    stage::wait_for(channel, |message| matches!(message, Message::Start))?;

    if let Some(state) = ending.state {
        hooks::run(ending.hooks, state)?;
    }
    reset_signals();
    let install = |filter: Option<&Filter>| match filter {
        Some(filter) => seccomp::install(filter).during(|| "install linux.seccomp".into()),
        None => Ok(()),
    };
    // Without no_new_privs the kernel wants CAP_SYS_ADMIN for a filter, so it comes before the capabilities go, and
    // has to allow that; with it, the filter comes last and needs to allow nothing but execve.
    if process.no_new_privileges {
        nix::sys::prctl::set_no_new_privs().during(|| "set process.noNewPrivileges".into())?;
        sys::close_on_exec_from(3).during(|| "mark descriptors".into())?;
        sets.apply()?;
        install(ending.filter)?;
    } else {
        sys::close_on_exec_from(3).during(|| "mark descriptors".into())?;
        install(ending.filter)?;
        sets.apply()?;
    }
    nix::unistd::execve(&c_program, &arguments, &environment)
        .map_err(|error| Step::execute(&program, error))
}

/// Keeps other processes of the container from tracing this one before it executes.
pub(super) fn hide() -> Result<(), Step> {
    nix::sys::prctl::set_dumpable(false).during(|| "hide from ptrace".into())
}

/// Gives the standard streams to the user, so that it can open them anew by `/dev/stdout`.
fn own_streams(uid: u32) {
    for stream in [
        std::os::fd::AsFd::as_fd(&io::stdin()),
        std::os::fd::AsFd::as_fd(&io::stdout()),
        std::os::fd::AsFd::as_fd(&io::stderr()),
    ] {
        let Ok(status) = fstat(stream) else { continue };
        let pipe = matches!(
            status.st_mode & libc::S_IFMT,
            libc::S_IFIFO | libc::S_IFSOCK
        );
        if pipe && status.st_uid != uid {
            // A stream that cannot change hands still works by its descriptor.
            let _ = fchown(stream, Some(Uid::from_raw(uid)), None);
        }
    }
}

/// Enters a directory, making it if it is missing.
fn enter(directory: &str) -> io::Result<()> {
    match nix::unistd::chdir(directory) {
        Err(Errno::ENOENT) => {
            fs::DirBuilder::new().recursive(true).create(directory)?;
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
            Ok(nix::unistd::chdir(directory)?)
        }
        other => Ok(other?),
    }
}

/// Checks that the working directory is inside of the container's root: a descriptor of the agent's that leaked, or a
/// directory moved away, would make it a way out.
fn inside() -> io::Result<()> {
    let directory = nix::unistd::getcwd()?;
    if directory.is_absolute() {
        Ok(())
    } else {
        Err(io::Error::other(
            "it is outside of the container's root file system",
        ))
    }
}

/// Changes user and groups and keeps the capabilities that are given up later.
fn change_user(process: &Process) -> Result<(), Step> {
    let user = &process.user;
    nix::sys::prctl::set_keepcaps(true).during(|| "keep capabilities".into())?;
    let groups: Vec<_> = user
        .additional_gids
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    setgroups(&groups).during(|| "set process.user.additionalGids".into())?;
    let gid = Gid::from_raw(user.gid);
    setresgid(gid, gid, gid).during(|| format!("set process.user.gid to {}", user.gid))?;
    let uid = Uid::from_raw(user.uid);
    setresuid(uid, uid, uid).during(|| format!("set process.user.uid to {}", user.uid))?;
    hide()?;
    capabilities::raise_permitted()
}

/// The environment with a home directory, which programs rely on.
fn environment(process: &Process) -> Result<Vec<String>, Step> {
    let mut environment = process.env.clone();
    if !environment.iter().any(|one| one.starts_with("HOME=")) {
        environment.push(format!("HOME={}", home(process.user.uid)));
    }
    Ok(environment)
}

/// The home directory of a user as the image's passwd has it, or the root.
fn home(uid: u32) -> String {
    passwd_home(Path::new("/etc/passwd"), uid).unwrap_or_else(|| "/".to_owned())
}

fn passwd_home(file: &Path, uid: u32) -> Option<String> {
    user::read(file).lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let home = fields.get(5)?;
        (fields.get(2)?.parse() == Ok(uid) && home.starts_with('/')).then(|| (*home).to_owned())
    })
}

/// The program's path.
fn find(process: &Process) -> Result<String, Step> {
    let name = process.args.first().map_or("", String::as_str);
    let usable = |path: &str| {
        let metadata = fs::metadata(path)?;
        if metadata.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        }
        if metadata.mode() & 0o111 == 0 {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        Ok(())
    };
    if name.contains('/') {
        usable(name).map_err(|error| Step::execute(name, error))?;
        return Ok(name.to_owned());
    }
    let path = process
        .env
        .iter()
        .rev()
        .find_map(|one| one.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    path.split(':')
        .map(|directory| match directory {
            "" => format!("./{name}"),
            directory => format!("{directory}/{name}"),
        })
        .find(|candidate| usable(candidate).is_ok())
        .ok_or_else(|| {
            let reason = format!("no such program in PATH {path}");
            Step::execute(name, io::Error::new(io::ErrorKind::NotFound, reason))
        })
}

/// Signals as a program expects them: what is ignored stays ignored over exec.
fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: sets the default action; numbers that cannot be changed are refused without harm.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// The number of a resource limit.
pub(crate) fn rlimit(name: &str) -> Option<u32> {
    Some(match name {
        "RLIMIT_AS" => libc::RLIMIT_AS,
        "RLIMIT_CORE" => libc::RLIMIT_CORE,
        "RLIMIT_CPU" => libc::RLIMIT_CPU,
        "RLIMIT_DATA" => libc::RLIMIT_DATA,
        "RLIMIT_FSIZE" => libc::RLIMIT_FSIZE,
        "RLIMIT_LOCKS" => libc::RLIMIT_LOCKS,
        "RLIMIT_MEMLOCK" => libc::RLIMIT_MEMLOCK,
        "RLIMIT_MSGQUEUE" => libc::RLIMIT_MSGQUEUE,
        "RLIMIT_NICE" => libc::RLIMIT_NICE,
        "RLIMIT_NOFILE" => libc::RLIMIT_NOFILE,
        "RLIMIT_NPROC" => libc::RLIMIT_NPROC,
        "RLIMIT_RSS" => libc::RLIMIT_RSS,
        "RLIMIT_RTPRIO" => libc::RLIMIT_RTPRIO,
        "RLIMIT_RTTIME" => libc::RLIMIT_RTTIME,
        "RLIMIT_SIGPENDING" => libc::RLIMIT_SIGPENDING,
        "RLIMIT_STACK" => libc::RLIMIT_STACK,
        _ => return None,
    })
}

/// The number of an execution domain.
///
/// # Errors
/// If there is none of that name, or flags are given, of which the specification has none.
pub(crate) fn personality(wanted: &Personality) -> Result<libc::c_ulong, String> {
    if !wanted.flags.is_empty() {
        return Err("flags are not supported".to_owned());
    }
    match wanted.domain.as_str() {
        "LINUX" => Ok(0),
        "LINUX32" => Ok(8),
        other => Err(format!("{other:?} is not LINUX or LINUX32")),
    }
}

/// Sets the NIS domain name of the UTS namespace.
pub(super) fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: reads as many bytes as it is told.
    let result = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use caisson_proto::Unexecutable;

    use super::*;

    #[test]
    fn the_home_directory_is_the_users() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("passwd");
        fs::write(
            &file,
            "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:\nrel:x:34:34::x:\n",
        )
        .unwrap();
        assert_eq!(passwd_home(&file, 0).as_deref(), Some("/root"));
        assert_eq!(passwd_home(&file, 33).as_deref(), Some("/var/www"));
        assert_eq!(passwd_home(&file, 34), None);
        assert_eq!(passwd_home(&file, 5), None);
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        assert_eq!(passwd_home(&pipe, 0), None);
    }

    #[test]
    fn programs_are_found_in_the_path_of_the_process() {
        let find = |name: &str, env: &[&str]| {
            find(&Process {
                args: vec![name.into()],
                env: env.iter().map(|&one| one.into()).collect(),
                ..Process::default()
            })
            .map_err(|step| (step.to_string(), step.unexecutable().unwrap()))
        };
        let refused = |name, why, word| {
            let (said, told) = find(name, &[]).unwrap_err();
            assert!(said.contains(word) && told == why, "{said} {told:?}");
        };
        assert_eq!(find("sh", &["PATH=/nonexistent:/bin"]).unwrap(), "/bin/sh");
        assert_eq!(find("/bin/sh", &[]).unwrap(), "/bin/sh");
        refused("no-such-program", Unexecutable::Missing, "no-such-program");
        refused("/no/such", Unexecutable::Missing, "/no/such");
        refused("/etc/passwd", Unexecutable::Refused, "denied");
        refused("/etc", Unexecutable::Refused, "directory");
    }
}
