use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;

use caisson_proto::cri;
use caisson_vmm_protocol::Part;

use super::*;
use crate::store::{ContainerRecord, ContainerState, Proto, SandboxRecord};

fn here() -> Dependencies {
    Dependencies {
        version: "1".into(),
        kernel: "k".into(),
        initramfs: "i".into(),
        vmm: "v".into(),
        processor: "p".into(),
    }
}

fn container(id: char, state: ContainerState) -> ContainerRecord {
    ContainerRecord {
        state,
        started_at: 2,
        log_path: "/var/log/c.log".into(),
        guest_pid: 3,
        ..ContainerRecord::first(
            id.to_string().repeat(64),
            "a".repeat(64),
            format!("c_{id}"),
            1,
        )
    }
}

fn manifest() -> Manifest {
    Manifest {
        format: Manifest::FORMAT,
        written_at: 5,
        depends: here(),
        machine: Machine {
            vcpus: 1,
            memory_mib: 64,
            growth: None,
        },
        layers: Vec::new(),
        memory: FileCheck::default(),
        state: FileCheck::default(),
        scratch: None,
        pod: SandboxRecord::first("a".repeat(64), "web".into(), 1),
        containers: vec![container('b', ContainerState::Running)],
    }
}

/// A snapshot of a machine that has a page of ones.
fn written(dir: &Path, manifest: Manifest) -> PathBuf {
    let path = dir.join("snapshot");
    let writing = Writing::begin(&path).unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let part = Part {
        offset: 8192,
        length: 4096,
    };
    let sent = std::thread::spawn(move || {
        theirs.write_all(&part.to_bytes()).unwrap();
        theirs.write_all(&[1; 4096]).unwrap();
        theirs.write_all(&Part::END.to_bytes()).unwrap();
        theirs.write_all(b"{}").unwrap();
    });
    writing.take_machine(ours.into(), 64 << 20).unwrap();
    sent.join().unwrap();
    let disk = dir.join("disk");
    fs::write(&disk, "a disk").unwrap();
    writing.copy_disk(&disk).unwrap();
    writing.finish(manifest).unwrap();
    path
}

#[test]
fn what_was_written_is_read_and_nothing_else() {
    let temp = tempfile::tempdir().unwrap();
    let path = written(temp.path(), manifest());
    for entry in fs::read_dir(&path).unwrap() {
        let mode = entry.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let snapshot = Snapshot::open(&path, &here()).unwrap();
    assert_eq!(snapshot.memory.metadata().unwrap().len(), 64 << 20);
    let mut page = [0; 4];
    snapshot.memory.read_exact_at(&mut page, 8192).unwrap();
    assert_eq!(page, [1; 4]);
    assert_eq!(fs::read(snapshot.scratch.unwrap()).unwrap(), b"a disk");
    assert_eq!(snapshot.manifest.containers, manifest().containers);

    let refused = |why: &str| {
        let error = Snapshot::open(&path, &here()).err().unwrap().to_string();
        assert!(error.contains(why), "{error}");
    };
    fs::write(path.join(SCRATCH), "a d1sk").unwrap();
    refused("scratch.img is damaged: its content");
    fs::write(path.join(SCRATCH), "a").unwrap();
    refused("has 1 bytes and not 6");
    fs::remove_file(path.join(SCRATCH)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", path.join(SCRATCH)).unwrap();
    refused("cannot open");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
    refused("not root's alone");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    let text = fs::read_to_string(path.join(MANIFEST)).unwrap();
    fs::write(
        path.join(MANIFEST),
        text.replace("\"format\": 1", "\"format\": 2"),
    )
    .unwrap();
    refused("has format 2");
    fs::write(path.join(MANIFEST), &text[..100]).unwrap();
    refused("manifest.json is damaged");
    fs::remove_file(path.join(MANIFEST)).unwrap();
    refused("not a whole snapshot");
}

#[test]
fn half_a_snapshot_is_removed_and_what_is_there_is_left() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("snapshot");
    let writing = Writing::begin(&path).unwrap();
    let twice = Writing::begin(&path).err().unwrap().to_string();
    assert!(twice.contains("exists already"), "{twice}");
    drop(writing);
    assert!(!path.exists());
    assert!(Writing::begin(&temp.path().join("no/such")).is_err());
}

#[test]
fn a_manifest_of_today_is_read_tomorrow() {
    let seed = include_str!("../../../tests/fuzz/seeds/config_files/manifest");
    assert_eq!(fuzzing::manifest(&seed[1..]), None);
}

#[test]
fn a_manifest_that_no_pod_has_is_refused() {
    let volume = cri::ContainerConfig {
        mounts: vec![cri::Mount {
            host_path: "/etc".into(),
            container_path: "/x".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let change = |change: fn(&mut Manifest)| {
        let mut manifest = manifest();
        change(&mut manifest);
        manifest
    };
    let mut with_volume = manifest();
    with_volume.containers[0].config = Proto(volume);
    let bad = [
        change(|m| m.machine.vcpus = 0),
        change(|m| m.machine.memory_mib = u32::MAX),
        change(|m| m.pod.id = "../../etc".into()),
        change(|m| m.pod.kind = crate::config::HandlerKind::Host),
        change(|m| m.containers[0].sandbox_id = "c".repeat(64)),
        change(|m| m.containers[0].id.clone_from(&m.pod.id)),
        change(|m| m.containers[0].state = ContainerState::Creating),
        change(|m| m.containers[0].log_path = "/var/log/../../etc/passwd".into()),
        change(|m| m.containers[0].log_path = "etc/passwd".into()),
        change(|m| {
            let one = m.containers[0].clone();
            m.containers.push(one);
        }),
        change(|m| {
            m.layers.push(PlacedLayer {
                diff_id: "sha256:../x".into(),
                offset: 0,
                bytes: 0,
            });
        }),
        with_volume,
    ];
    for manifest in bad {
        let text = serde_json::to_vec(&manifest).unwrap();
        let damaged = |reason| SnapshotError::Damaged {
            path: "m".into(),
            reason,
        };
        assert!(Manifest::parse(&text, damaged).is_err(), "{manifest:?}");
    }
}
