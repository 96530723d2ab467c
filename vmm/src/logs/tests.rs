//! Logs from an agent's streams to their files, with the agent's end of each stream in the test's hands.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::format::MAX_TEXT;
use super::*;

const LONG: Duration = Duration::from_secs(60);
const MOMENT: Duration = Duration::from_millis(100);

/// The agent's end of a stream, after the header line was read and answered.
struct Stream {
    line: String,
    socket: UnixStream,
}

/// Answers each header line, and hands the streams it accepted to the test.
struct Agent {
    answer: &'static str,
    streams: Mutex<Sender<Stream>>,
}

impl Dial for Agent {
    fn dial(&self, port: u32, _: Duration) -> io::Result<UnixStream> {
        assert_eq!(port, caisson_vmm_protocol::STREAM_PORT);
        let (ours, theirs) = UnixStream::pair()?;
        let (answer, streams) = (self.answer, self.streams.lock().unwrap().clone());
        std::thread::spawn(move || {
            let mut line = String::new();
            let mut socket = BufReader::new(theirs);
            socket.read_line(&mut line).unwrap();
            let mut socket = socket.into_inner();
            socket.write_all(answer.as_bytes()).unwrap();
            let _ = streams.send(Stream { line, socket });
        });
        Ok(ours)
    }
}

struct Pod {
    logs: LogManager,
    streams: Receiver<Stream>,
    events: Receiver<Event>,
}

impl Pod {
    fn answering(answer: &'static str) -> Self {
        let (streams, opened) = channel();
        let (events, told) = channel();
        let agent = Agent {
            answer,
            streams: Mutex::new(streams),
        };
        let events = Mutex::new(events);
        let sink: EventSink = Arc::new(move |event| {
            let _ = events.lock().unwrap().send(event);
        });
        Self {
            logs: LogManager::new(agent, sink),
            streams: opened,
            events: told,
        }
    }

    fn new() -> Self {
        Self::answering("OK\n")
    }

    fn add(&self, new: NewLog) -> Vec<UnixStream> {
        let (id, terminal) = (new.container_id.clone(), new.terminal);
        self.logs.add(new).unwrap();
        let names: &[&str] = if terminal {
            &["tty"]
        } else {
            &["stdout", "stderr"]
        };
        // Each stream has a thread of its own, so that they come in any order.
        let mut opened: Vec<_> = names
            .iter()
            .map(|_| self.streams.recv_timeout(LONG).unwrap())
            .collect();
        names
            .iter()
            .map(|name| {
                let line = format!("STREAM {id} - {name}\n");
                let at = opened.iter().position(|stream| stream.line == line);
                opened.remove(at.unwrap()).socket
            })
            .collect()
    }

    fn event(&self) -> Event {
        self.events.recv_timeout(LONG).unwrap()
    }
}

fn new(id: &str, file: Option<OwnedFd>) -> NewLog {
    NewLog {
        container_id: id.to_owned(),
        terminal: false,
        file,
        stdout: None,
        stderr: None,
    }
}

fn drained(id: &str) -> Event {
    Event::LogDrained {
        container_id: id.to_owned(),
    }
}

fn log_file() -> (tempfile::NamedTempFile, Option<OwnedFd>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let fd = file.as_file().try_clone().unwrap().into();
    (file, Some(fd))
}

/// What a reader of the log makes of it: each stream's bytes. It checks every line on the way.
fn parse(log: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    assert!(log.is_empty() || log.ends_with(b"\n"));
    for line in log.split_inclusive(|b| *b == b'\n') {
        let line = &line[..line.len() - 1];
        let mut fields = line.splitn(4, |b| *b == b' ');
        let time = fields.next().unwrap();
        assert_eq!(time.len(), "2026-11-22T00:00:00.123456789Z".len());
        let stream = match fields.next().unwrap() {
            b"stdout" => &mut stdout,
            b"stderr" => &mut stderr,
            other => panic!("{other:?}"),
        };
        let tag = fields.next().unwrap();
        let text = fields.next().unwrap();
        assert!(text.len() <= MAX_TEXT);
        stream.extend_from_slice(text);
        match tag {
            b"F" => stream.push(b'\n'),
            b"P" => {}
            other => panic!("{other:?}"),
        }
    }
    (stdout, stderr)
}

#[test]
fn both_streams_arrive_separately_and_to_the_last_byte() {
    let pod = Pod::new();
    let (file, fd) = log_file();
    let mut streams = pod.add(new("c1", fd));
    let mut stderr = streams.pop().unwrap();
    let mut stdout = streams.pop().unwrap();
    stdout.write_all(b"out\nno end").unwrap();
    stderr.write_all(b"err\n").unwrap();
    drop(stdout);
    assert!(pod.events.recv_timeout(MOMENT).is_err());
    assert!(pod.logs.drained().is_empty());
    assert!(!pod.logs.finish(Duration::ZERO));
    drop(stderr);
    assert_eq!(pod.event(), drained("c1"));
    assert_eq!(pod.logs.drained(), ["c1"]);
    assert!(pod.logs.finish(LONG));
    let log = std::fs::read(file.path()).unwrap();
    assert_eq!(parse(&log), (b"out\nno end".to_vec(), b"err\n".to_vec()));
    assert!(
        String::from_utf8(log)
            .unwrap()
            .contains(" stdout P no end\n")
    );
}

#[test]
fn no_output_and_no_file_are_drained_too() {
    let pod = Pod::new();
    drop(pod.add(NewLog {
        terminal: true,
        ..new("silent", None)
    }));
    assert_eq!(pod.event(), drained("silent"));
}

// must-test: exec and logs that lose the tail of the output when the process ends quickly
#[test]
fn a_hundred_megabytes_are_byte_exact() {
    const LEN: usize = 100 << 20;
    let pod = Pod::new();
    let (file, fd) = log_file();
    let mut streams = pod.add(new("big", fd));
    let mut stderr = streams.pop().unwrap();
    let mut stdout = streams.pop().unwrap();
    // Lines of all lengths up to three parts and more, binary bytes among them.
    let mut bytes = Vec::with_capacity(LEN);
    let mut state = 1_u64;
    while bytes.len() < LEN {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let len = (state >> 33) as usize % if state >> 63 == 0 { 80 } else { 50_000 };
        let len = len.min(LEN - bytes.len() - 1);
        bytes.extend((0..len).map(|i| match (i as u64 ^ state >> 40) as u8 {
            b'\n' => b' ',
            byte => byte,
        }));
        bytes.push(b'\n');
    }
    let errors: Vec<u8> = bytes[..1 << 20].to_vec();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            stdout.write_all(&bytes).unwrap();
            drop(stdout);
        });
        scope.spawn(|| {
            stderr.write_all(&errors).unwrap();
            drop(stderr);
        });
        assert_eq!(pod.event(), drained("big"));
    });
    let (stdout, stderr) = parse(&std::fs::read(file.path()).unwrap());
    assert!(stdout == bytes);
    assert!(stderr == errors);
}

#[test]
fn a_full_disk_holds_output_back_until_there_is_another_file() {
    let pod = Pod::new();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut streams = pod.add(new("c1", Some(full.into())));
    let mut stderr = streams.pop().unwrap();
    let mut stdout = streams.pop().unwrap();
    stdout.write_all(b"kept\n").unwrap();
    let Event::LogFailed {
        container_id,
        message,
    } = pod.event()
    else {
        panic!("another event");
    };
    assert_eq!(container_id, "c1");
    assert!(message.contains("No space left"), "{message}");
    stderr.write_all(b"also kept\n").unwrap();
    drop((stdout, stderr));
    assert!(pod.events.recv_timeout(MOMENT).is_err());
    let (file, fd) = log_file();
    pod.logs.reopen("c1", fd.unwrap()).unwrap();
    let over = Event::LogRecovered {
        container_id: "c1".into(),
    };
    assert_eq!(pod.event(), over);
    assert_eq!(pod.event(), drained("c1"));
    let log = std::fs::read(file.path()).unwrap();
    assert_eq!(parse(&log), (b"kept\n".to_vec(), b"also kept\n".to_vec()));
}

#[test]
fn a_rotation_loses_and_repeats_nothing() {
    let pod = Pod::new();
    let (first, fd) = log_file();
    let mut files = vec![first];
    let mut streams = pod.add(new("c1", fd));
    drop(streams.pop());
    let mut stdout = streams.pop().unwrap();
    let bytes: Vec<u8> = (0..200_000)
        .flat_map(|n| format!("{n}\n").into_bytes())
        .collect();
    std::thread::scope(|scope| {
        let sent = &bytes;
        scope.spawn(move || stdout.write_all(sent).unwrap());
        for _ in 0..20 {
            let (file, fd) = log_file();
            pod.logs.reopen("c1", fd.unwrap()).unwrap();
            files.push(file);
        }
    });
    assert_eq!(pod.event(), drained("c1"));
    let all: Vec<u8> = files
        .iter()
        .flat_map(|f| parse(&std::fs::read(f.path()).unwrap()).0)
        .collect();
    assert!(all == bytes);
}

#[test]
fn attached_clients_get_copies_and_may_leave() {
    let pod = Pod::new();
    let (file, fd) = log_file();
    let (mut early, ours) = UnixStream::pair().unwrap();
    let mut streams = pod.add(NewLog {
        stdout: Some(ours.into()),
        ..new("c1", fd)
    });
    let stderr = streams.pop().unwrap();
    let mut stdout = streams.pop().unwrap();
    stdout.write_all(b"one ").unwrap();
    let mut got = [0; 4];
    early.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"one ");
    drop(early);
    let (late, ours) = std::io::pipe().unwrap();
    pod.logs.attach("c1", Some(ours.into()), None).unwrap();
    let (gone, ours) = std::io::pipe().unwrap();
    drop(gone);
    pod.logs.attach("c1", Some(ours.into()), None).unwrap();
    stdout.write_all(b"two\n").unwrap();
    drop((stdout, stderr));
    assert_eq!(std::io::read_to_string(late).unwrap(), "two\n");
    assert_eq!(pod.event(), drained("c1"));
    assert_eq!(parse(&std::fs::read(file.path()).unwrap()).0, b"one two\n");
    // The stream has ended: a client sees that at once.
    let (after, ours) = std::io::pipe().unwrap();
    pod.logs.attach("c1", Some(ours.into()), None).unwrap();
    assert_eq!(std::io::read_to_string(after).unwrap(), "");
}

#[test]
fn a_slow_client_holds_up_its_stream_alone_and_not_the_removal() {
    let pod = Pod::new();
    let (file, fd) = log_file();
    let (slow, ours) = std::io::pipe().unwrap();
    let mut streams = pod.add(NewLog {
        stdout: Some(ours.into()),
        ..new("c1", fd)
    });
    let mut stderr = streams.pop().unwrap();
    let mut stdout = streams.pop().unwrap();
    let writer = std::thread::spawn(move || {
        let line = [b'x'; 1023];
        (0..2048).for_each(|_| {
            stdout.write_all(&line).unwrap();
            stdout.write_all(b"\n").unwrap();
        });
    });
    stderr.write_all(b"not held up\n").unwrap();
    let begin = std::time::Instant::now();
    while parse(&std::fs::read(file.path()).unwrap()).1.is_empty() {
        assert!(begin.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(stderr);
    assert!(!writer.is_finished());
    pod.logs.remove("c1");
    writer.join().unwrap();
    assert!(pod.logs.finish(LONG));
    // Nobody wants to know any more.
    assert!(pod.events.try_recv().is_err());
    assert_eq!(
        parse(&std::fs::read(file.path()).unwrap()).0.len(),
        2048 * 1024
    );
    drop(slow);
}

#[test]
fn wrong_calls_are_told_so() {
    let pod = Pod::new();
    for id in ["", "a b", "a\nSHUTDOWN", "../x/", &"x".repeat(129)] {
        assert!(matches!(
            pod.logs.add(new(id, None)),
            Err(LogError::BadId(_))
        ));
    }
    let streams = pod.add(new("c1", None));
    assert!(matches!(
        pod.logs.add(new("c1", None)),
        Err(LogError::Exists(_))
    ));
    let (_, fd) = log_file();
    assert!(matches!(
        pod.logs.reopen("c2", fd.unwrap()),
        Err(LogError::Unknown(_))
    ));
    pod.logs.remove("c1");
    drop(streams);
    // The name is free again.
    drop(pod.add(new("c1", None)));
    let (_, fd) = log_file();
    let terminal = NewLog {
        terminal: true,
        stderr: fd,
        ..new("c3", None)
    };
    assert!(matches!(pod.logs.add(terminal), Err(LogError::NoStderr(_))));
}

#[test]
fn an_agent_that_refuses_or_talks_nonsense_is_an_error() {
    let refused = Pod::answering("ERR no such\tcontainer\n");
    let error = refused.logs.add(new("c1", None)).unwrap_err().to_string();
    assert!(error.contains("no such container"), "{error}");
    // Nothing is left of it.
    assert!(matches!(
        refused.logs.reopen("c1", log_file().1.unwrap()),
        Err(LogError::Unknown(_))
    ));
    let long: &'static str = Box::leak("x".repeat(4096).into_boxed_str());
    for answer in ["HELLO\n", "ERR\n", "OKAY\n", long] {
        let error = Pod::answering(answer)
            .logs
            .add(new("c1", None))
            .unwrap_err();
        assert!(
            matches!(error, LogError::Agent(AgentStreamError::Protocol { .. })),
            "{error}"
        );
    }
}

#[test]
fn a_held_stream_goes_on_in_the_next_one_and_its_end_is_none() {
    let pod = Pod::new();
    let file = tempfile::NamedTempFile::new().unwrap();
    let log = file.as_file().try_clone().unwrap().into();
    let (copy, mut seen) = UnixStream::pair().unwrap();
    let mut streams = pod.add(NewLog {
        stdout: Some(copy.into()),
        ..new("c", Some(log))
    });
    let mut out = streams.remove(0);
    let err = streams.remove(0);
    out.write_all(b"whole\nbeg").unwrap();
    pod.logs.hold();
    drop((out, err));
    pod.logs.wait_until_held().unwrap();
    // Of what a reader has seen nothing is under way, and nobody takes the container's output for complete.
    let lines = |text: String| {
        let words = text
            .lines()
            .map(|line| line.splitn(3, ' ').nth(2).unwrap().to_owned());
        words.collect::<Vec<_>>()
    };
    let text = || lines(std::fs::read_to_string(file.path()).unwrap());
    assert_eq!(text(), ["F whole", "P beg"]);
    assert!(pod.logs.finish(MOMENT));
    assert!(pod.events.recv_timeout(MOMENT).is_err());

    let logs = &pod.logs;
    std::thread::scope(|scope| {
        scope.spawn(|| logs.release().unwrap());
        let opened = [
            pod.streams.recv_timeout(LONG).unwrap(),
            pod.streams.recv_timeout(LONG).unwrap(),
        ];
        for mut stream in opened {
            if stream.line.contains("stdout") {
                stream.socket.write_all(b"un\n").unwrap();
            }
        }
    });
    assert_eq!(pod.event(), drained("c"));
    assert_eq!(text(), ["F whole", "P beg", "F un"]);
    let mut all = String::new();
    seen.read_to_string(&mut all).unwrap();
    assert_eq!(all, "whole\nbegun\n");
}

#[test]
fn a_log_that_is_removed_while_it_is_held_keeps_no_thread() {
    let pod = Pod::new();
    let streams = pod.add(new("c", None));
    pod.logs.hold();
    drop(streams);
    pod.logs.wait_until_held().unwrap();
    let log = pod.logs.find("c").unwrap();
    pod.logs.remove("c");
    let end = std::time::Instant::now() + LONG;
    while !log.is_drained() {
        assert!(std::time::Instant::now() < end);
        std::thread::yield_now();
    }
}
