//! The steps of the calls that change something on the node: the moments at which a daemon that dies leaves something
//! else behind. Whatever the step, the next daemon brings the node to order, and the call can be made again.
//!
//! In a build with debug assertions, as the end-to-end tests have it, the daemon kills itself at the step that the environment
//! variable [`DIE_AT`] names; they walk over all of them. A release has nothing of it.

/// Names the step at which the daemon dies, in a build with debug assertions.
#[cfg(debug_assertions)]
pub const DIE_AT: &str = "CAISSON_DIE_AT";

macro_rules! steps {
    ($($(#[$about:meta])* $list:ident { $($(#[$what:meta])* $step:ident,)* })*) => {
        /// What was done last.
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub enum Step {
            $($($(#[$what])* $step,)*)*
        }

        $($(#[$about])* pub const $list: &[Step] = &[$(Step::$step),*];)*
    };
}

steps! {
    /// RunPodSandbox, of every kind of pod.
    RUN {
        /// The name is reserved.
        RunRecorded,
        /// The network namespace is there.
        NamespaceMade,
        /// What CNI's DEL needs is on the disk.
        AttachmentKept,
        /// The plugins have given the pod an address.
        AttachmentMade,
        /// The pod's directories are there.
        DirectoriesMade,
        /// The disk of writable layers is there.
        ScratchMade,
        /// The pod process runs, and nothing says whose it is.
        ProcessStarted,
        /// Its process ID is noted.
        ProcessNoted,
        /// It is in its control group.
        ProcessPlaced,
        /// It does what it was asked to; nobody has been told.
        ProcessAtWork,
        /// The agent has set up the pod.
        AgentReady,
        /// The record says so; the client does not know.
        RunSaved,
    }
    /// RunPodSandbox, of a microVM.
    RUN_MICROVM {
        /// The tap and the interface have each other's frames.
        TapJoined,
        /// The share is mounted.
        ShareMade,
    }
    /// RunPodSandbox, of a pod on the host.
    RUN_HOST {
        /// The pod's control groups are there.
        GroupsMade,
        /// The agent runs, without a pod process beside it.
        AgentStarted,
    }
    /// CreateContainer, with a volume.
    CREATE {
        /// The name is reserved.
        CreateRecorded,
        /// A place for a volume is there, and nothing on it.
        VolumePlaceMade,
        /// The volumes are mounted.
        VolumesShared,
        /// The agent has made the container.
        AgentCreated,
        /// The record says so; the client does not know.
        CreateSaved,
    }
    /// StartContainer.
    START {
        /// The record says that it is being started.
        StartRecorded,
        /// The pod process writes its log.
        LogAdded,
        /// The process runs.
        AgentStartedContainer,
        /// The record says so; the client does not know.
        StartSaved,
    }
    /// StopContainer.
    STOP {
        /// The process was asked to end.
        StopSent,
        /// Its end is known here, not in the record.
        EndHeard,
        /// It is in the record.
        EndSaved,
    }
    /// RemoveContainer.
    REMOVE {
        /// The record says that it is being removed.
        RemoveRecorded,
        /// The agent has forgotten the container.
        AgentRemoved,
        /// Its log is closed, and its volumes are gone.
        ContainerForgotten,
        /// The record is gone; the client does not know.
        RemoveSaved,
    }
    /// StopPodSandbox.
    STOP_POD {
        /// The record says that the pod is being stopped.
        StopPodRecorded,
        /// Its containers have ended.
        ContainersKilled,
        /// Its process has ended.
        SandboxStopped,
        /// The plugins have released the pod's address.
        AttachmentReleased,
        /// The network namespace is gone.
        NamespaceRemoved,
        /// The record says that the pod is stopped; the client does not know.
        StopPodSaved,
    }
    /// Snapshot.
    SNAPSHOT {
        /// The directory is there.
        SnapshotBegun,
        /// The containers are frozen, and their output is let go of.
        PodStandsStill,
        /// The machine is parked, and written.
        MachineWritten,
        /// The manifest is there; the pod stands still.
        SnapshotWritten,
        /// The record says that the pod is being removed.
        SnapshotPodEnds,
    }
    /// Restore.
    RESTORE {
        /// The pod's name is reserved.
        RestoreRecorded,
        /// The containers go on; nothing of their output is read.
        PodRestored,
        /// The records say so; the client does not know.
        RestoreSaved,
    }
    /// RemovePodSandbox, of a pod that has containers.
    REMOVE_POD {
        /// The record says that the pod is being removed.
        RemovePodRecorded,
        /// Its containers are removed.
        ContainersRemoved,
        /// Its control group is gone.
        GroupRemoved,
        /// Its sockets are gone, and its disk is there.
        StateRemoved,
        /// Nothing of it is there but the record.
        SandboxRemoved,
        /// Neither is that; the client does not know.
        RemovePodSaved,
    }
}

/// Says that a step is done.
#[cfg(debug_assertions)]
pub fn done(step: Step) {
    let named = std::env::var(DIE_AT).is_ok_and(|name| name == format!("{step:?}"));
    if named {
        eprintln!("dying at the step {step:?}, as {DIE_AT} asks for");
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::SIGKILL);
        loop {
            std::thread::park();
        }
    }
}

/// Says that a step is done.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn done(_: Step) {}
