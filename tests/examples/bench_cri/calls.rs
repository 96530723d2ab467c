//! How long the calls take by which a kubelet looks at its node.

use std::time::{Duration, Instant};

use caisson_proto::cri;
use caisson_tests::runtime::Result;
use prost::Message;
use tonic::Status;

use crate::peer::Peer;

/// The calls, in the order of the table.
const CALLS: [Call; 7] = [
    Call::ListContainers,
    Call::ListPodSandbox,
    Call::ContainerStatus,
    Call::PodSandboxStatus,
    Call::ListContainerStats,
    Call::ListPodSandboxStats,
    Call::Status,
];

#[derive(Clone, Copy, Debug)]
enum Call {
    ListContainers,
    ListPodSandbox,
    ContainerStatus,
    PodSandboxStatus,
    ListContainerStats,
    ListPodSandboxStats,
    Status,
}

/// What came back: the number of its entries, and the message.
type Answer = (usize, Box<dyn Message>);

fn answer<M: Message + 'static>(message: M, entries: impl FnOnce(&M) -> usize) -> Answer {
    (entries(&message), Box::new(message))
}

impl Call {
    /// Makes the call for the `turn`th time.
    async fn make(self, peer: &Peer, turn: usize) -> std::result::Result<Answer, Status> {
        let mut client = peer.client.clone();
        Ok(match self {
            Self::ListContainers => {
                let request = cri::ListContainersRequest::default();
                let got = client.list_containers(request).await?.into_inner();
                answer(got, |got| got.containers.len())
            }
            Self::ListPodSandbox => {
                let request = cri::ListPodSandboxRequest::default();
                let got = client.list_pod_sandbox(request).await?.into_inner();
                answer(got, |got| got.items.len())
            }
            Self::ContainerStatus => {
                let request = cri::ContainerStatusRequest {
                    container_id: peer.containers[turn % peer.containers.len()].clone(),
                    verbose: false,
                };
                let got = client.container_status(request).await?.into_inner();
                answer(got, |got| got.status.iter().count())
            }
            Self::PodSandboxStatus => {
                let request = cri::PodSandboxStatusRequest {
                    pod_sandbox_id: peer.pods[turn % peer.pods.len()].0.clone(),
                    verbose: false,
                };
                let got = client.pod_sandbox_status(request).await?.into_inner();
                answer(got, |got| got.status.iter().count())
            }
            Self::ListContainerStats => {
                let request = cri::ListContainerStatsRequest::default();
                let got = client.list_container_stats(request).await?.into_inner();
                let known = |stats: &&cri::ContainerStats| stats.cpu.is_some();
                answer(got, |got| got.stats.iter().filter(known).count())
            }
            Self::ListPodSandboxStats => {
                let request = cri::ListPodSandboxStatsRequest::default();
                let got = client.list_pod_sandbox_stats(request).await?.into_inner();
                answer(got, |got| {
                    let linux = got.stats.iter().filter_map(|stats| stats.linux.as_ref());
                    linux.map(|stats| stats.containers.len()).sum()
                })
            }
            Self::Status => {
                let request = cri::StatusRequest::default();
                let got = client.status(request).await?.into_inner();
                answer(got, |got| got.status.iter().count())
            }
        })
    }
}

/// What a runtime needed for one kind of call.
#[derive(Default)]
struct Times {
    all: Vec<Duration>,
    /// Entries and bytes of the last answer.
    entries: usize,
    bytes: usize,
    /// The processor time that the runtime took meanwhile.
    processor: Duration,
    failed: Option<Status>,
}

impl Times {
    /// The time within which this part of the calls was answered.
    fn within(&self, part: f64) -> Option<Duration> {
        let mut sorted = self.all.clone();
        sorted.sort();
        let rank = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.max(1) - 1).copied()
    }

    fn shown(&self) -> String {
        match (self.within(0.5), self.within(0.99), &self.failed) {
            (_, _, Some(status)) => format!("{:?} | – | – | –", status.code()),
            (Some(p50), Some(p99), None) => {
                let (p50, p99, processor) = (ms(p50), ms(p99), ms(self.processor));
                let (entries, bytes) = (self.entries, self.bytes);
                format!("{p50} | {p99} | {processor} | {entries}, {bytes} B")
            }
            _ => "– | – | – | –".to_owned(),
        }
    }
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// Makes each call on each runtime in turn and prints a table; the last columns have the ratio of the 99th
/// percentiles, and whether the first runtime needed no more than the second. The processor time is that of the runtime's
/// own process for one call, whatever else it did meanwhile included.
///
/// # Errors
/// A runtime has ended. A call that fails is told in the table.
pub async fn compare(peers: &[Peer], calls: usize, stats_calls: usize) -> Result<()> {
    let names = peers
        .iter()
        .map(|peer| format!("{0} p50 | {0} p99 | processor | answer", peer.name));
    let names: Vec<_> = names.collect();
    println!("| call | {} | p99 ratio | |", names.join(" | "));
    println!("|---|{}---|---|", "---|".repeat(4 * peers.len()));
    for call in CALLS {
        let mut times: Vec<Times> = peers.iter().map(|_| Times::default()).collect();
        let calls = match call {
            Call::ListContainerStats | Call::ListPodSandboxStats => stats_calls,
            _ => calls,
        };
        // The first calls warm up both sides.
        let warm = (calls / 20).max(2);
        let mut before = Vec::new();
        for turn in 0..warm + calls {
            if turn == warm {
                before = peers
                    .iter()
                    .map(Peer::processor_time)
                    .collect::<Result<_>>()?;
            }
            for (peer, times) in peers.iter().zip(&mut times) {
                if times.failed.is_some() {
                    continue;
                }
                let began = Instant::now();
                let answer = call.make(peer, turn).await;
                let took = began.elapsed();
                match answer {
                    Ok((entries, message)) => {
                        (times.entries, times.bytes) = (entries, message.encoded_len());
                    }
                    Err(status) => times.failed = Some(status),
                }
                if turn >= warm {
                    times.all.push(took);
                }
            }
        }
        for ((peer, times), before) in peers.iter().zip(&mut times).zip(before) {
            times.processor = (peer.processor_time()? - before) / calls as u32;
        }
        let verdict = match times.as_slice() {
            [ours, theirs] if ours.failed.is_none() && theirs.failed.is_none() => {
                let p99 = |times: &Times| times.within(0.99).unwrap_or_default().as_secs_f64();
                let ratio = p99(ours) / p99(theirs);
                let met = if ratio <= 1.0 { "met" } else { "not met" };
                format!("{ratio:.2} | {met}")
            }
            _ => "– | not compared".to_owned(),
        };
        let shown: Vec<_> = times.iter().map(Times::shown).collect();
        println!("| {call:?} | {} | {verdict} |", shown.join(" | "));
        for (peer, times) in peers.iter().zip(&times) {
            if let Some(status) = &times.failed {
                eprintln!("{}: {call:?}: {status}", peer.name);
            }
        }
    }
    Ok(())
}
