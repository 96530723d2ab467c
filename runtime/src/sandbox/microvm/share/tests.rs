use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, chdir, fork, pause, pivot_root};

use super::*;
use crate::sandbox::pod::{PodConfig, process};

/// A process in the share, as a pod process is; it ends when this is dropped.
struct Process(Pid);

impl Process {
    fn start(dir: &PodDir) -> Self {
        let root = dir.share();
        let (mut ready, tell) = io::pipe().unwrap();
        let none = None::<&str>;
        let enter = || -> nix::Result<()> {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
            chdir(&root)?;
            pivot_root(".", ".")?;
            umount2(".", MntFlags::MNT_DETACH)
        };
        // SAFETY: the child makes system calls only, and never returns.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let entered = enter().is_ok();
                let _ = nix::unistd::write(&tell, &[u8::from(entered)]);
                loop {
                    pause();
                }
            }
            ForkResult::Parent { child } => {
                let own = Self(child);
                let mut entered = [0];
                io::Read::read_exact(&mut ready, &mut entered).unwrap();
                assert_eq!(entered, [1], "the process is not in its share");
                process::note_pid(dir, child.as_raw() as u32).unwrap();
                own
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

struct Setup {
    temp: tempfile::TempDir,
    dir: PodDir,
    share: Share,
}

impl Setup {
    /// `None` where mounts cannot be made.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let temp = tempfile::tempdir().unwrap();
        let config = PodConfig {
            vmm: "/x".into(),
            state_dir: temp.path().join("s"),
            data_dir: temp.path().join("d"),
            cgroup_parent: String::new(),
        };
        let id = "a1".repeat(32);
        let dir = PodDir::new(&id, &config).unwrap();
        dir.create().unwrap();
        let share = Share::new(&id, &dir);
        share.create().unwrap();
        Some(Self { temp, dir, share })
    }

    /// Does it where the guest's files are.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        namespace::run(&self.dir, || Ok(work())).unwrap().unwrap()
    }

    /// A directory with a file, and a tmpfs on a directory in it.
    fn volume(&self) -> (PathBuf, Mounted) {
        let volume = self.temp.path().join("volume");
        let below = volume.join("below");
        fs::create_dir_all(&below).unwrap();
        fs::write(volume.join("f"), "x").unwrap();
        let none = None::<&str>;
        mount(none, &below, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        mount(none, &below, none, MsFlags::MS_SHARED, none).unwrap();
        (volume, Mounted(below))
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        let _ = detach(&self.dir.share());
    }
}

/// Unmounted when it is dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = detach(&self.0);
    }
}

const READ_ONLY: VolumeOptions = VolumeOptions {
    read_only: true,
    recursive_read_only: false,
    follows_host: false,
    ids: None,
};

// must-test: a read-only mount written through another path
#[tokio::test]
async fn volumes_are_mounted_for_the_pod_alone() {
    let Some(setup) = Setup::new() else { return };
    let (share, temp) = (&setup.share, setup.temp.path());
    let pod = Process::start(&setup.dir);
    let host = temp.join("data");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("f"), "x").unwrap();
    let of_host = || -> Vec<_> {
        let below = mounts::below(temp).unwrap();
        below.map(|mount| mount.point).collect()
    };
    assert_eq!(of_host(), [setup.dir.share()]);

    let read_only = share.volume("c1", &host, READ_ONLY).await.unwrap();
    let options = VolumeOptions::default();
    let writable = share.volume("c1", &host, options).await.unwrap();
    assert_eq!(read_only.path, "/run/caisson/share/c/c1/0");
    assert_eq!(writable.path, "/run/caisson/share/c/c1/1");
    assert!(!read_only.partly_writable && !writable.partly_writable);
    setup.inside(|| {
        assert_eq!(fs::read_to_string("/c/c1/0/f").unwrap(), "x");
        assert!(fs::write("/c/c1/0/f", "y").is_err());
        fs::write("/c/c1/1/f", "y").unwrap();
        assert!(fs::write("/own", "y").is_err());
    });
    assert_eq!(fs::read_to_string(host.join("f")).unwrap(), "y");
    // The host has none of it.
    assert_eq!(of_host(), [setup.dir.share()]);

    let socket = temp.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let error = share.volume("c1", &socket, options).await.unwrap_err();
    assert!(error.to_string().contains("is a socket"), "{error}");
    assert!(share.volume("c1", &temp.join("no"), options).await.is_err());

    // As a daemon that was restarted finds it.
    let share = Share::new("p", &setup.dir);
    share.unshare("c1").await.unwrap();
    share.unshare("c1").await.unwrap();
    setup.inside(|| assert!(!Path::new("/c/c1").exists()));
    assert_eq!(fs::read_to_string(host.join("f")).unwrap(), "y");

    share.volume("c2", &host, options).await.unwrap();
    drop(pod);
    let error = share.volume("c2", &host, options).await.unwrap_err();
    assert!(error.to_string().contains("has ended"), "{error}");
    share.unshare("c2").await.unwrap();
    share.remove_all().await.unwrap();
    share.remove_all().await.unwrap();
    assert_eq!(mounts::below(temp).unwrap().next(), None);
    assert_eq!(fs::read_to_string(host.join("f")).unwrap(), "y");
}

#[tokio::test]
async fn mounts_below_a_read_only_volume_are_read_only_where_it_is_asked() {
    let Some(setup) = Setup::new() else { return };
    let pod = Process::start(&setup.dir);
    let (volume, mounted) = setup.volume();
    let plain = setup.share.volume("c", &volume, READ_ONLY).await.unwrap();
    let all = VolumeOptions {
        recursive_read_only: true,
        ..READ_ONLY
    };
    let recursive = setup.share.volume("c", &volume, all).await.unwrap();
    assert!(plain.partly_writable && !recursive.partly_writable);
    setup.inside(|| {
        assert!(fs::write("/c/c/0/f", "y").is_err());
        fs::write("/c/c/0/below/new", "y").unwrap();
        assert_eq!(fs::read_to_string("/c/c/1/below/new").unwrap(), "y");
        assert!(fs::write("/c/c/1/below/new", "z").is_err());
    });

    // For the host it is not busy.
    drop(mounted);
    fs::remove_dir_all(&volume).unwrap();
    drop(pod);
}

#[tokio::test]
async fn mounts_of_the_host_appear_where_it_is_asked() {
    let Some(setup) = Setup::new() else { return };
    let pod = Process::start(&setup.dir);
    let (volume, _mounted) = setup.volume();
    let below = volume.join("below");
    for follows_host in [true, false] {
        let options = VolumeOptions {
            follows_host,
            ..VolumeOptions::default()
        };
        setup.share.volume("c", &below, options).await.unwrap();
    }
    let late = below.join("late");
    fs::create_dir(&late).unwrap();
    let none = None::<&str>;
    mount(none, &late, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let late = Mounted(late);
    fs::write(late.0.join("f"), "x").unwrap();
    setup.inside(|| {
        assert!(Path::new("/c/c/0/late/f").exists());
        assert!(!Path::new("/c/c/1/late/f").exists());
        // And never the other way.
        mount(none, "/c/c/0/late", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    });
    assert!(late.0.join("f").exists());
    drop(late);
    drop(pod);
}

#[tokio::test]
async fn owners_are_the_pods_where_it_is_asked() {
    let Some(setup) = Setup::new() else { return };
    if let Err(error) = super::super::try_ids(setup.temp.path()) {
        eprintln!(
            "skipped: the IDs of {} cannot be mapped: {error}",
            setup.temp.path().display()
        );
        return;
    }
    let pod = Process::start(&setup.dir);
    let volume = setup.temp.path().join("data");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("f"), "x").unwrap();
    let range = |first| crate::sandbox::ids::IdRange { first, length: 10 };
    let options = VolumeOptions {
        ids: Some(crate::sandbox::ids::UserIds {
            uids: range(1000),
            gids: range(2000),
        }),
        ..VolumeOptions::default()
    };
    setup.share.volume("c", &volume, options).await.unwrap();
    setup.inside(|| {
        let owner = |path| {
            let meta = fs::metadata(path).unwrap();
            (meta.uid(), meta.gid())
        };
        assert_eq!(owner("/c/c/0/f"), (1000, 2000));
        std::os::unix::fs::chown("/c/c/0/f", Some(1005), Some(2007)).unwrap();
        // Who has no ID there has no place.
        assert!(std::os::unix::fs::chown("/c/c/0/f", Some(0), None).is_err());
        assert!(fs::write("/c/c/0/new", "y").is_err());
    });
    let meta = fs::metadata(volume.join("f")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (5, 7));
    drop(pod);
}
