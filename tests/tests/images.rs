//! Images: pulled by the real daemon from a real registry, and what a crash or a full disk leaves of them.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use caisson_tests::{Disk, ImageNode, Pushed, Random, Registry, number};

/// How often the daemon is killed, unless `CAISSON_TEST_KILLS` says it: 200 for the long form.
const KILLS: u32 = 20;

fn timed(work: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    work();
    begin.elapsed()
}

/// Kills the daemon (SIGKILL) in the middle of pulls, loads, and of the collection after a removal, at random points. After each
/// the store is whole, and the next pull works.
#[test]
fn killed_at_any_point() {
    let kills = number("CAISSON_TEST_KILLS").map_or(KILLS, |kills| kills as u32);
    let mut random = Random::seeded();
    let registry = Registry::start();
    let one = registry.push("one", &[1, 2, 3]);
    let two = registry.push("two", &[1, 4]);
    let known: [&Pushed; 2] = [&one, &two];
    let dir = tempfile::Builder::new()
        .prefix("caisson-test-")
        .tempdir_in("/var/lib")
        .unwrap();
    let mut node = ImageNode::start(dir.path());
    let archive = dir.path().join("one.tar");
    let archive = archive.to_str().unwrap();

    // How long each takes when nobody disturbs it.
    let pull = timed(|| drop(node.must(&["pull", "-q", &one.name])));
    node.must(&["save", "-o", archive, &one.name]);
    let remove = timed(|| drop(node.must(&["rmi", &one.name])));
    let load = timed(|| drop(node.must(&["load", "-q", archive])));
    println!("pull {pull:?}, load {load:?}, remove {remove:?}");
    assert_eq!(node.assert_whole(&known), 1);

    let (mut interrupted, mut complete) = (0, 0);
    for kill in 0..kills {
        let (arguments, limit): (&[&str], _) = match kill % 4 {
            0 => (&["pull", "-q", &one.name], pull),
            1 => (&["load", "-q", archive], load),
            2 => (&["pull", "-q", &two.name], pull),
            _ => (&["rmi", &one.name, &two.name], remove * 2),
        };
        match kill % 4 {
            // What is to be brought in is not here, and what is to be removed is.
            0 | 1 => drop(node.caisson(&["rmi", &one.id])),
            2 => drop(node.caisson(&["rmi", &two.id])),
            _ => {
                node.must(&["pull", "-q", &one.name]);
                node.must(&["pull", "-q", &two.name]);
            }
        }
        let mut work = node
            .command(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("caisson runs");
        std::thread::sleep(random.below(limit));
        node.kill();
        match work.wait().expect("caisson is waited for").success() {
            true => complete += 1,
            false => interrupted += 1,
        }
        node.serve();
        node.assert_whole(&known);
    }
    println!("{interrupted} interrupted, {complete} complete before the kill");
    assert!(interrupted > kills / 4, "the kills came too late");
    node.must(&["pull", "-q", &one.name]);
    node.must(&["pull", "-q", &two.name]);
    assert_eq!(node.assert_whole(&known), 2);
}

/// A disk that fills up in each phase of a pull: a clear error each time, the store whole, and with room all goes on.
#[test]
fn a_disk_that_fills_up() {
    let registry = Registry::start();
    let small = registry.push("small", &[7]);
    let large = registry.push("large", &[1, 2]);
    let disk = Disk::new(40, &[]);
    let node = ImageNode::start(&disk.path());
    node.must(&["pull", "-q", &small.name]);
    let mut failures = 0;
    for kilobytes in [0, 8, 64, 300, 700, 900, 1300, 2500] {
        let ballast = disk.leave(kilobytes);
        let output = node.caisson(&["pull", "-q", &large.name]);
        fs::remove_file(ballast).unwrap();
        if output.status.success() {
            node.must(&["rmi", &large.name]);
            continue;
        }
        failures += 1;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("is full"), "{kilobytes}: {said}");
        // Room is there again; the same daemon goes on.
        node.must(&["prune"]);
        wait_until_settled(&node.store());
        node.must(&["prune"]);
        assert_eq!(node.assert_whole(&[&small, &large]), 1, "{kilobytes}");
    }
    assert!(failures > 4, "{failures}");
    node.must(&["pull", "-q", &large.name]);
    assert_eq!(node.assert_whole(&[&small, &large]), 2);
}

/// The threads of a pull's other layers end soon after it.
fn wait_until_settled(store: &Path) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while fs::read_dir(store.join("tmp")).unwrap().next().is_some() {
        assert!(Instant::now() < deadline, "files are left in tmp");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The commands that have to do with images, as a person uses them.
#[test]
fn a_persons_commands() {
    let registry = Registry::start();
    let (one, two) = (registry.push("one", &[1]), registry.push("two", &[1, 2]));
    let known = [&one, &two];
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let node = ImageNode::start(here.path());
    for image in known {
        assert_eq!(node.must(&["pull", &image.name]).trim(), image.id);
    }
    let inspected: serde_json::Value =
        serde_json::from_str(&node.must(&["inspect", &two.name])).unwrap();
    assert_eq!(inspected[0]["id"], two.id);
    assert_eq!(inspected[0]["layers"].as_array().unwrap().len(), 2);
    assert_eq!(inspected[0]["imageSpec"]["config"]["Cmd"][0], "two");
    assert!(!node.caisson(&["inspect", "none"]).status.success());

    // Saved here, loaded there: the same images. By a file and through a pipe.
    let archive = here.path().join("both.tar");
    let archive = archive.to_str().unwrap();
    node.must(&["save", "-o", archive, &one.name, &two.name]);
    let piped = node.caisson(&["save", &one.name, &two.name]).stdout;
    assert!(piped == fs::read(archive).unwrap());
    let other = ImageNode::start(there.path());
    other.must(&["load", "-q", archive]);
    for image in known {
        assert!(
            other
                .must(&["images"])
                .contains(image.name.trim_end_matches(":latest"))
        );
        let inspected = other.must(&["inspect", &image.name]);
        assert!(inspected.contains(&image.id), "{inspected}");
    }
    let missing = here.path().join("missing.tar");
    let failed = node.caisson(&["save", "-o", missing.to_str().unwrap(), &one.name, "none"]);
    assert!(!failed.status.success() && !missing.exists());

    // Only what has no name, then all.
    assert_eq!(node.must(&["prune"]), "");
    assert_eq!(node.must(&["prune", "--all"]).lines().count(), 2);
    assert_eq!(node.assert_whole(&known), 0);
    assert!(
        node.caisson(&["rmi", &one.name])
            .stderr
            .starts_with(b"caisson: there is no image")
    );
}
