//! How much goes between a pod and its host by TCP, by iperf3's count at the receiver.

use std::process::{Child, Command, Stdio};

use caisson_tests::runtime::{Container, Result, Runtime, Task};

use crate::figures::{Aim, Line, Samples, Unit};
use crate::pods::{Running, start_twice};
use crate::{Bench, give_up};

/// Where containers have iperf3 with its libraries: the host's are another system's.
const PLACE: &str = "/iperf";
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
/// The seconds of each measurement, and those before it that do not count.
const SECONDS: &str = "5";
const WARM: &str = "1";

/// iperf3's server on the host. It is killed when it is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Bench {
    /// The throughput of a pod on Caisson and of one on containerd with runc, in turn, from the pod and to it.
    pub async fn network(&mut self) -> Result<()> {
        let [first, rest @ ..] = &command(&self.options.iperf.display().to_string())[..] else {
            return Err("there is no iperf3".into());
        };
        let server = Command::new(first)
            .args(rest)
            .arg("--server")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("{first}: {error}"))?;
        let _server = Server(server);
        let peers = [&self.caisson, &self.runc];
        let (mut pods, mut notes) = (Vec::new(), Vec::new());
        let measured = self.rates(peers, &mut pods, &mut notes).await;
        for (runtime, running) in peers.into_iter().zip(pods) {
            give_up(runtime, running.pod).await;
        }
        notes.into_iter().for_each(|note| self.report.note(note));
        let [ours, theirs, ours_in, theirs_in] = measured?;
        for (what, ours, theirs, aim) in [
            ("TCP, pod to host", ours, theirs, Aim::AtLeast(0.8)),
            ("TCP, host to pod", ours_in, theirs_in, Aim::Reference),
        ] {
            self.report.line(Line {
                what: what.into(),
                unit: Unit::GigabitsPerSecond,
                ours,
                peer: "a veth pod of containerd",
                theirs,
                aim,
            });
        }
        Ok(())
    }

    /// A pod on each runtime, and the throughput of both: from the pods, then to them.
    async fn rates(
        &self,
        peers: [&Runtime; 2],
        pods: &mut Vec<Running>,
        notes: &mut Vec<String>,
    ) -> Result<[Samples; 4]> {
        for runtime in peers {
            let task = Task {
                volume: Some((&self.options.iperf, PLACE)),
                ..self.task()
            };
            let (running, note) = start_twice(runtime, task).await?;
            pods.push(running);
            notes.extend(note);
        }
        let mut rates = [(); 4].map(|()| Samples::default());
        for round in 0..self.options.rounds.min(5) {
            for turn in 0..4 {
                let number = (round + turn) % 4;
                let (peer, to_pod) = (number % 2, number / 2 == 1);
                let host = self
                    .options
                    .hosts
                    .get(peer)
                    .ok_or("an address is missing")?;
                let rate = rate(peers[peer], &pods[peer].container, host, to_pod).await?;
                let direction = if to_pod { "to" } else { "from" };
                eprintln!("{}: {rate:.2} Gbit/s {direction} the pod", peers[peer].name);
                rates[number].push(rate);
            }
        }
        Ok(rates)
    }
}

/// What arrives at the receiver, in Gbit/s.
async fn rate(runtime: &Runtime, container: &Container, host: &str, to_pod: bool) -> Result<f64> {
    let mut command = command(PLACE);
    let options = [
        "--json", "--client", host, "--time", SECONDS, "--omit", WARM,
    ];
    command.extend(options.map(str::to_owned));
    if to_pod {
        command.push("--reverse".to_owned());
    }
    let words: Vec<_> = command.iter().map(String::as_str).collect();
    let said = runtime.exec_command(container, &words).await?;
    let told: serde_json::Value = serde_json::from_str(&said)?;
    let bits = told["end"]["sum_received"]["bits_per_second"].as_f64();
    let bits = bits.ok_or_else(|| format!("{}: iperf3 told no rate: {said}", runtime.name))?;
    Ok(bits / 1e9)
}

/// The command line of iperf3 below a directory, with the loader and the libraries that are there.
fn command(tree: &str) -> Vec<String> {
    let libraries = LIBRARIES
        .map(|directory| format!("{tree}/{directory}"))
        .join(":");
    let loader = format!("{tree}/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
    let program = format!("{tree}/usr/bin/iperf3");
    vec![loader, "--library-path".to_owned(), libraries, program]
}
