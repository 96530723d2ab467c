//! `caisson-agent`: PID 1 of a pod's guest.
//!
//! As PID 1 it boots the guest and serves on vsock. With `--listen unix:PATH --stream-listen unix:PATH` it serves
//! the same on unix sockets, without touching the system before it is asked to; with `--host` and what belongs to it
//! it is the agent of a pod that runs on the host (see [`host`]). The engine and the sandbox start
//! the binary again for processes of their own; what they are to be is their first argument.

use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use caisson_agent::host;
use caisson_agent::reaper::Reaper;
use caisson_agent::sandbox::{self, pidns};
use caisson_agent::service::{self, Ending, Pod, shutdown};
use caisson_agent::streams;
use caisson_agent::vsock::{self, GRPC_PORT, Listener, STREAM_PORT};
use caisson_agent::{boot, engine, error, info};
use tokio::signal::unix::{SignalKind, signal};

const USAGE: &str = "usage: caisson-agent --listen unix:PATH --stream-listen unix:PATH\n           [--host ROOT --scratch FILE --images DIR [--netns PATH | --new-net] [--new-ipc] [--new-uts]]\n       (or no arguments, as PID 1 of a guest)";

/// Threads for what blocks: containers being made, and statistics being read.
const BLOCKING_THREADS: usize = 64;

/// Where to serve.
enum Mode {
    Guest,
    Unix {
        grpc: String,
        streams: String,
        host: host::Options,
    },
}

/// Listening sockets, made where their paths still mean what the daemon means.
enum Sockets {
    Guest,
    Unix(UnixListener, UnixListener),
}

fn main() -> ExitCode {
    let started = Instant::now();
    let arguments: Vec<String> = std::env::args_os()
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    if arguments.get(1).is_some_and(|first| first == engine::INIT) {
        engine::init_main();
    }
    if arguments.get(1).is_some_and(|first| first == pidns::PAUSE) {
        return finish(pidns::main());
    }
    let Some(mode) = mode(arguments.get(1..).unwrap_or_default()) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    // One heap for all threads: the agent is mostly idle, and small.
    // SAFETY: mallopt takes numbers only, and no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    if matches!(mode, Mode::Guest)
        && let Err(error) = boot::boot()
    {
        // PID 1 ends, the kernel panics, and the host reads both in the serial log.
        error!("boot: {error}");
        return ExitCode::FAILURE;
    }
    let sockets = match listen(&mode) {
        Ok(sockets) => sockets,
        Err(error) => {
            error!("listen: {error}");
            return ExitCode::FAILURE;
        }
    };
    if let Mode::Unix { host, .. } = &mode
        && host.given()
        && let Err(error) = host::enter(host)
    {
        error!("host: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(Duration::from_secs(2))
        .thread_stack_size(1 << 20)
        .build();
    match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(run(sockets, started));
            // A thread that hangs in the kernel is no reason to stay.
            runtime.shutdown_background();
            finish(result)
        }
        Err(error) => finish(Err(error)),
    }
}

fn finish(result: std::io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn mode(arguments: &[String]) -> Option<Mode> {
    let (mut grpc, mut streams) = (None, None);
    let mut host = host::Options::default();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if let Some(taken) = host.option(argument, &mut rest) {
            taken.ok()?;
            continue;
        }
        let place = match argument.as_str() {
            "--listen" => &mut grpc,
            "--stream-listen" => &mut streams,
            // The kernel hands PID 1 the words of its command line that it does not know itself.
            _ if std::process::id() == 1 => continue,
            _ => return None,
        };
        *place = Some(rest.next()?.strip_prefix("unix:")?.to_owned());
    }
    if host.given() && !host.complete() {
        return None;
    }
    match (grpc, streams) {
        (Some(grpc), Some(streams)) => Some(Mode::Unix {
            grpc,
            streams,
            host,
        }),
        (None, None) if std::process::id() == 1 => Some(Mode::Guest),
        _ => None,
    }
}

fn listen(mode: &Mode) -> std::io::Result<Sockets> {
    Ok(match mode {
        Mode::Guest => Sockets::Guest,
        Mode::Unix { grpc, streams, .. } => {
            Sockets::Unix(vsock::bind_unix(grpc)?, vsock::bind_unix(streams)?)
        }
    })
}

/// Serves until the pod ends.
async fn run(sockets: Sockets, started: Instant) -> std::io::Result<()> {
    let reaper = Reaper::new();
    let (ending, grpc, raw) = match sockets {
        Sockets::Guest => (
            Ending::PowerOff,
            Listener::vsock(GRPC_PORT)?,
            Listener::vsock(STREAM_PORT)?,
        ),
        Sockets::Unix(grpc, streams) => {
            // Orphans of containers come to this process, although it is not PID 1.
            nix::sys::prctl::set_child_subreaper(true)?;
            (
                Ending::Exit,
                Listener::unix(grpc)?,
                Listener::unix(streams)?,
            )
        }
    };
    let pod = Pod::new(started, reaper.clone(), ending);
    service::watch(&pod);
    let reaping = tokio::spawn(reaper.run());
    let streaming = tokio::spawn(streams::listen(raw, pod.clone()));
    let serving = tokio::spawn(service::serve(grpc, pod.clone()));
    info!(
        "version {} ready after {} ms",
        env!("CARGO_PKG_VERSION"),
        started.elapsed().as_millis()
    );
    if ending == Ending::PowerOff {
        tokio::spawn(vsock::knock(vsock::READY_PORT));
    }
    let settling = {
        let pod = pod.clone();
        async move {
            if ending == Ending::PowerOff {
                let settled = tokio::task::spawn_blocking(boot::settle).await?;
                settled.map_err(|error| std::io::Error::other(format!("boot: {error}")))?;
                tokio::spawn(vsock::knock(vsock::SETTLED_PORT));
            }
            pod.settled();
            // From here on there is nothing that could fail.
            std::future::pending::<std::io::Result<()>>().await
        }
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let asked_to_end = async {
        terminate.recv().await;
        shutdown::run(&pod, shutdown::DEFAULT_GRACE).await;
        std::future::pending::<()>().await;
    };
    // None of these ends while the agent is well.
    tokio::select! {
        result = settling => result,
        result = serving => Err(std::io::Error::other(format!("the gRPC server has ended: {result:?}"))),
        result = streaming => Err(std::io::Error::other(format!("the stream server has ended: {result:?}"))),
        result = reaping => Err(std::io::Error::other(format!("the reaper has ended: {result:?}"))),
        () = asked_to_end => Ok(()),
        () = pod.ended.notified() => {
            sandbox::tear_down();
            Ok(())
        }
    }
}
