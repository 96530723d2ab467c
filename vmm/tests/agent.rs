//! The VMM with the real agent as the guest's init: ready, spoken to on its ports, shut down.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use caisson_vmm_protocol::{
    AGENT_PORT, Channel, Event, ExitReason, LogConfig, Reply, Request, STREAM_PORT, VsockConfig,
};
use support::{LIMIT, Spec, kernel};

/// The connection preface of HTTP/2 and an empty SETTINGS frame (RFC 9113 §3.4, §6.5).
const HTTP2_HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const SETTINGS: u8 = 4;

fn connect(socket: &std::path::Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    assert!(line(&mut stream).starts_with("OK "));
    stream
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

#[test]
fn the_agent_serves_behind_vsock_and_shuts_the_machine_down() {
    let Some(kernel) = kernel("vmlinux") else {
        return;
    };
    let mut spec = Spec::new(&kernel, "");
    let initramfs = File::open(kernel.with_file_name("initramfs.cpio")).unwrap();
    spec.config.initramfs = Some(spec.lend(initramfs));
    let socket = spec.dir.path().join("vsock");
    let listener = spec.lend(UnixListener::bind(&socket).unwrap());
    spec.config.vsock = Some(VsockConfig {
        cid: 3,
        listener: Some(listener),
    });
    let mut vm = spec.boot().unwrap();
    let mut events = Channel::new(vm.connect());
    events.send(&Request::Watch, &[]).unwrap();
    assert!(matches!(
        events.recv::<Reply>().unwrap().message,
        Reply::Done
    ));
    assert_eq!(events.recv::<Event>().unwrap().message, Event::AgentReady);
    assert!(vm.status().agent_ready);

    let mut grpc = connect(&socket, AGENT_PORT);
    grpc.write_all(HTTP2_HELLO).unwrap();
    let mut frame = [0; 9];
    grpc.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], SETTINGS);

    let mut stream = connect(&socket, STREAM_PORT);
    writeln!(stream, "STREAM nobody - stdout").unwrap();
    let answer = line(&mut stream);
    assert!(answer.starts_with("ERR "), "{answer}");

    let refused = vm.ask(&Request::AddLog(LogConfig {
        container_id: "nobody".into(),
        terminal: false,
        file: None,
        stdout: None,
        stderr: None,
    }));
    let Reply::Error { message } = refused else {
        panic!("{refused:?}");
    };
    assert!(message.contains("nobody"), "{message}");

    assert!(matches!(vm.ask(&Request::Shutdown), Reply::Done));
    assert_eq!(
        events.recv::<Event>().unwrap().message,
        Event::Exited(ExitReason::PoweredOff)
    );
    assert_eq!(vm.wait().code(), Some(0));
}
