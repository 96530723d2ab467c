//! Many commands at once, as probes are.

use std::time::Instant;

use caisson_proto::cri;
use tokio::task::JoinSet;

use crate::peer::Peer;

/// Runs a command in so many containers at the same time and tells how many succeeded.
pub async fn execs(peer: &Peer, count: usize) {
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let mut client = peer.client.clone();
        let request = cri::ExecSyncRequest {
            container_id: peer.containers[number % peer.containers.len()].clone(),
            cmd: ["echo", "well"].map(str::to_owned).to_vec(),
            timeout: 120,
        };
        tasks.spawn(async move {
            let answer = client.exec_sync(request).await?.into_inner();
            Ok::<_, tonic::Status>(answer.exit_code == 0 && answer.stdout == b"well\n")
        });
    }
    let (mut well, mut wrong, mut failed) = (0, 0, Vec::new());
    for result in tasks.join_all().await {
        match result {
            Ok(true) => well += 1,
            Ok(false) => wrong += 1,
            Err(status) => failed.push(status),
        }
    }
    let met = if well == count { "met" } else { "not met" };
    println!(
        "- {}: {well} of {count} succeeded, {wrong} answered wrongly, {} failed, in {:.1} s: {met}",
        peer.name,
        failed.len(),
        began.elapsed().as_secs_f64()
    );
    if let Some(status) = failed.first() {
        println!("  - {status}");
    }
}
