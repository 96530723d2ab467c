//! Streams and logs with a real guest kernel. The guest's side is this test program itself, run there by busybox.

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use caisson_vmm_protocol::{
    Channel, Event, ExitReason, FdIndex, LogConfig, READY_PORT, Reply, Request, STREAM_PORT,
    VsockConfig,
};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, connect, listen, socket,
};
use support::{LIMIT, Spec, Vm, kernel};

/// Sends back what it gets.
const ECHO: u32 = 5000;
/// Gets a byte, sends [`LEN`] bytes and closes.
const SOURCE: u32 = 5001;
/// Takes all there is, then answers whether it is what [`SOURCE`] sends.
const SINK: u32 = 5002;
/// Accepts and never reads.
const STUCK: u32 = 5003;
/// Nobody listens here.
const NOBODY: u32 = 5999;

const LEN: usize = 32 << 20;
/// Lines of the log; their text is the number.
const LINES: u32 = 200_000;

/// Bytes in which no two places within 4 GiB look alike, made quickly also by an emulated processor.
fn pattern(len: usize) -> Vec<u8> {
    let mut block = [0; 4096];
    for (i, byte) in block.iter_mut().enumerate() {
        *byte = (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3];
    }
    let mut bytes = Vec::with_capacity(len + block.len());
    let mut number = 0_u32;
    while bytes.len() < len {
        block[..4].copy_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&block);
        number += 1;
    }
    bytes.truncate(len);
    bytes
}

/// The guest's side: not a test of its own.
#[test]
#[ignore = "runs in the guest, where a_guest_talks_to_the_host starts it"]
fn guest() {
    assert!(
        std::env::var_os("IN_GUEST").is_some(),
        "this is the guest's side of another test; it runs only there"
    );
    serve(ECHO, |mut stream| {
        let mut bytes = vec![0; 65536];
        loop {
            match stream.read(&mut bytes).unwrap() {
                0 => break,
                n => stream.write_all(&bytes[..n]).unwrap(),
            }
        }
        stream.shutdown(Shutdown::Write).unwrap();
    });
    serve(SOURCE, |mut stream| {
        stream.write_all(&pattern(LEN)).unwrap()
    });
    serve(SINK, |mut stream| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let same = bytes == pattern(LEN);
        writeln!(stream, "{} {same}", bytes.len()).unwrap();
    });
    serve(STUCK, |stream| {
        std::mem::forget(stream);
    });
    let listener = listen_on(STREAM_PORT);
    // The agent's connection to the host is refused, which is the answer.
    let ready = vsock();
    connect(ready.as_raw_fd(), &VsockAddr::new(2, READY_PORT)).unwrap_err();
    let stdout = open_stream(&listener, "STREAM c1 - stdout\n");
    let stderr = open_stream(&listener, "STREAM c1 - stderr\n");
    let mut stdout = std::io::BufWriter::with_capacity(65536, stdout);
    for line in 0..LINES {
        writeln!(stdout, "line {line}").unwrap();
    }
    stdout.write_all(b"the tail").unwrap();
    stdout.flush().unwrap();
    drop((stdout, stderr));
    // The machine ends at once, with whatever is still under way.
}

fn vsock() -> OwnedFd {
    socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap()
}

fn listen_on(port: u32) -> OwnedFd {
    let listener = vsock();
    bind(listener.as_raw_fd(), &VsockAddr::new(u32::MAX, port)).unwrap();
    listen(&listener, Backlog::new(128).unwrap()).unwrap();
    listener
}

/// A stream socket is read, written and shut down alike, whatever its family.
fn accepted(listener: &OwnedFd) -> UnixStream {
    let fd = accept(listener.as_raw_fd()).unwrap();
    // SAFETY: the kernel has just made the descriptor for us.
    unsafe { UnixStream::from_raw_fd(fd) }
}

fn serve(port: u32, each: impl Fn(UnixStream) + Send + Sync + Copy + 'static) {
    let listener = listen_on(port);
    std::thread::spawn(move || {
        loop {
            let stream = accepted(&listener);
            std::thread::spawn(move || each(stream));
        }
    });
}

fn open_stream(listener: &OwnedFd, header: &str) -> UnixStream {
    let mut stream = accepted(listener);
    let mut line = vec![0; header.len()];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(line, header.as_bytes());
    stream.write_all(b"OK\n").unwrap();
    stream
}

/// This program and the libraries that it is linked with.
fn programs() -> Vec<PathBuf> {
    let program = std::env::current_exe().unwrap();
    let listed = Command::new("ldd").arg(&program).output().unwrap();
    let mut paths = vec![program];
    for word in String::from_utf8(listed.stdout).unwrap().split_whitespace() {
        if word.starts_with('/') {
            paths.push(word.into());
        }
    }
    paths
}

struct Host {
    socket: PathBuf,
}

impl Host {
    fn ask(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream
    }

    fn connect(&self, port: u32) -> UnixStream {
        let mut stream = self.ask(port);
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        assert!(answer.starts_with(b"OK "), "{answer:?}");
        stream
    }

    fn echo(&self, bytes: &[u8]) {
        let stream = self.connect(ECHO);
        let mut back = Vec::new();
        std::thread::scope(|scope| {
            let mut out = &stream;
            scope.spawn(move || {
                out.write_all(bytes).unwrap();
                out.shutdown(Shutdown::Write).unwrap();
            });
            (&stream).read_to_end(&mut back).unwrap();
        });
        assert!(back == bytes);
    }
}

fn boot(kernel: &Path) -> (Vm, Host) {
    let programs = programs();
    let placed: Vec<(&str, &Path)> = programs
        .iter()
        .enumerate()
        .map(|(i, path)| match i {
            0 => ("bin/guest", path.as_path()),
            _ => (path.to_str().unwrap(), path.as_path()),
        })
        .collect();
    let mut spec = Spec::with_programs(
        kernel,
        "IN_GUEST=1 guest --ignored --exact guest --nocapture; poweroff -f",
        &placed,
    );
    spec.config.memory_mib = 512;
    let socket = spec.dir.path().join("vsock");
    let listener = spec.lend(UnixListener::bind(&socket).unwrap());
    spec.config.vsock = Some(VsockConfig {
        cid: 3,
        listener: Some(listener),
    });
    (spec.boot().unwrap(), Host { socket })
}

fn rate(what: &str, begun: Instant) {
    let time = begun.elapsed();
    let rate = LEN as f64 / f64::from(1 << 20) / time.as_secs_f64();
    println!("{what}: {} MiB in {time:.2?}, {rate:.0} MiB/s", LEN >> 20);
}

#[test]
fn a_guest_talks_to_the_host() {
    let Some(kernel) = kernel("vmlinux") else {
        return;
    };
    let (mut vm, host) = boot(&kernel);
    let mut events = Channel::new(vm.connect());
    events.send(&Request::Watch, &[]).unwrap();
    assert!(matches!(
        events.recv::<Reply>().unwrap().message,
        Reply::Done
    ));
    // A client may come before the guest is up: it is answered when the guest can.
    assert_eq!(events.recv::<Event>().unwrap().message, Event::AgentReady);

    let bytes = pattern(LEN);
    host.echo(b"");
    host.echo(&bytes[..2 << 20]);

    let mut got = Vec::with_capacity(LEN);
    let mut source = host.connect(SOURCE);
    source.write_all(b"!").unwrap();
    source.read_exact(&mut [0]).unwrap();
    let begun = Instant::now();
    source.read_to_end(&mut got).unwrap();
    rate("from the guest", begun);
    assert!(got == bytes[1..]);

    let begun = Instant::now();
    let mut sink = host.connect(SINK);
    sink.write_all(&bytes).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    sink.read_to_string(&mut answer).unwrap();
    rate("to the guest", begun);
    assert_eq!(answer, format!("{LEN} true\n"));

    let mut refused = host.ask(NOBODY);
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);

    // Streams that nobody reads, in both directions, hold up no others.
    let stuck = host.connect(STUCK);
    stuck
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    (&stuck).write_all(&bytes).unwrap_err();
    let mut unread = host.connect(SOURCE);
    unread.write_all(b"!").unwrap();
    std::thread::scope(|scope| {
        for n in 0..50 {
            let (host, bytes) = (&host, &bytes[n..300_000 + 1000 * n]);
            scope.spawn(move || host.echo(bytes));
        }
    });
    drop((stuck, unread));

    let log = vm.dir.path().join("log");
    let file = File::create(&log).unwrap();
    let add = Request::AddLog(LogConfig {
        container_id: "c1".into(),
        terminal: false,
        file: Some(FdIndex(0)),
        stdout: None,
        stderr: None,
    });
    let begun = Instant::now();
    vm.channel.send(&add, &[file.as_raw_fd()]).unwrap();
    assert!(matches!(
        vm.channel.recv::<Reply>().unwrap().message,
        Reply::Done
    ));
    let drained = Event::LogDrained {
        container_id: "c1".into(),
    };
    assert_eq!(events.recv::<Event>().unwrap().message, drained);
    println!("a log of {LINES} lines: {:.2?}", begun.elapsed());
    assert_eq!(
        events.recv::<Event>().unwrap().message,
        Event::Exited(ExitReason::PoweredOff)
    );
    assert_eq!(vm.wait().code(), Some(0));
    let mut lines = BufReader::new(File::open(&log).unwrap()).lines();
    for n in 0..LINES {
        let line = lines.next().unwrap().unwrap();
        assert!(line.ends_with(&format!("Z stdout F line {n}")), "{line}");
    }
    let last = lines.next().unwrap().unwrap();
    assert!(last.ends_with("Z stdout P the tail"), "{last}");
    assert!(lines.next().is_none());
}
