//! What an idle pod holds of the host's memory.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use caisson_tests::runtime::{Result, Runtime};

use crate::Bench;
use crate::figures::{Aim, Line, Samples, Unit};
use crate::pods::Running;
use crate::scale::empty;

/// Pods side by side, which share what they can.
const PODS: usize = 5;
/// How long they are left alone before they count as idle.
const IDLE: Duration = Duration::from_secs(5);
/// The most that a pod process and its guest may have, and the most that the process has for itself: MiB.
const POD_LIMIT: f64 = 15.0;
const HEAP_LIMIT: f64 = 5.0;
/// The least memory of a guest, in KiB: no mapping of the process's own is as large.
const GUEST: u64 = 64 << 10;

impl Bench {
    /// The memory of pods that do nothing: a process that is Caisson's, and those that are containerd's.
    pub async fn memory(&mut self) -> Result<()> {
        let mut all = [(); 3].map(|()| Samples::default());
        for number in 0..2 {
            let runtime = [&self.caisson, &self.runc][number];
            let (pods, notes) = self.wave(runtime, PODS).await;
            tokio::time::sleep(IDLE).await;
            let looked = look_at_all(runtime, &pods).await;
            empty(runtime, pods).await;
            notes.into_iter().for_each(|note| self.report.note(note));
            for (pod, heap) in looked? {
                all[number].push(pod);
                heap.into_iter().for_each(|heap| all[2].push(heap));
            }
        }
        let [ours, theirs, heap] = all;
        for (what, ours, peer, theirs, aim) in [
            (
                "idle pod's memory (PSS), 5 side by side",
                ours.clone(),
                "the limit",
                POD_LIMIT.into(),
                Aim::AtMost(1.0),
            ),
            (
                "idle pod's memory (PSS), 5 side by side",
                ours,
                "containerd with runc",
                theirs,
                Aim::Reference,
            ),
            (
                "the VMM's own heap",
                heap,
                "the limit",
                HEAP_LIMIT.into(),
                Aim::AtMost(1.0),
            ),
        ] {
            self.report.line(Line {
                what: what.into(),
                unit: Unit::Mebibytes,
                ours,
                peer,
                theirs,
                aim,
            });
        }
        Ok(())
    }
}

async fn look_at_all(runtime: &Runtime, pods: &[Running]) -> Result<Vec<(f64, Option<f64>)>> {
    let mut found = Vec::new();
    for running in pods {
        found.push(look(runtime, running).await?);
    }
    match found.is_empty() {
        true => Err(format!("{}: no pod was started", runtime.name).into()),
        false => Ok(found),
    }
}

/// The proportional set size of a pod's processes and, of a microVM's, what is not the guest's: MiB.
async fn look(runtime: &Runtime, running: &Running) -> Result<(f64, Option<f64>)> {
    let details = runtime.details(&running.pod).await?;
    // Caisson tells of its pod process, containerd of the sandbox's first one.
    let pid = details["pid"]
        .as_u64()
        .ok_or("the runtime told no process")?;
    if runtime.name == "caisson" {
        return Ok((mebibytes(pss(pid)?), Some(mebibytes(own_heap(pid)?))));
    }
    // That one, the pod's shim above it, and all below the shim.
    let parents = parents()?;
    let shim = *parents.get(&pid).ok_or("the sandbox's process has ended")?;
    let name = fs::read_to_string(format!("/proc/{shim}/comm"))?;
    if !name.starts_with("containerd-shim") {
        return Err(format!("the sandbox's process is below {name}, which is no shim").into());
    }
    let mut sum = 0;
    for &process in parents.keys() {
        if lineage(&parents, process).any(|above| above == shim) {
            sum += pss(process)?;
        }
    }
    Ok((mebibytes(sum), None))
}

fn mebibytes(kibibytes: u64) -> f64 {
    kibibytes as f64 / 1024.0
}

/// The proportional set size of a process, in KiB: each page counts for its share (proc(5), smaps_rollup).
fn pss(pid: u64) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let pss = text.lines().find_map(|line| figure(line, "Pss:"));
    Ok(pss.ok_or_else(|| format!("{path} has no Pss"))?)
}

/// Anonymous memory of a VMM outside the mappings that are large enough to be its guest's, in KiB.
fn own_heap(pid: u64) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    Ok(small_anonymous(&text)
        .ok_or_else(|| format!("{path} has no large mapping: where is the guest?"))?)
}

/// Sums up what is anonymous in all mappings but those of a guest; `None` if there is no guest. A guest's memory is
/// one stretch of addresses that can be written, in several mappings where a template's lies over some of it.
fn small_anonymous(smaps: &str) -> Option<u64> {
    // Where a stretch ends, its size and what is anonymous in it, in KiB.
    let mut stretches: Vec<(u64, u64, u64)> = Vec::new();
    for line in smaps.lines() {
        if let Some((begin, end, writable)) = mapping(line) {
            let size = (end - begin) >> 10;
            match stretches.last_mut() {
                Some((before, all, _)) if writable && *before == begin => {
                    (*before, *all) = (end, *all + size);
                }
                _ if writable => stretches.push((end, size, 0)),
                // No part of a guest, and nothing goes on after it.
                _ => stretches.push((0, 0, 0)),
            }
        } else if let Some(anonymous) = figure(line, "Anonymous:")
            && let Some((.., sum)) = stretches.last_mut()
        {
            *sum += anonymous;
        }
    }
    let own = stretches.iter().filter(|(_, size, _)| *size < GUEST);
    let sum = own.clone().map(|(.., anonymous)| anonymous).sum();
    (own.count() < stretches.len()).then_some(sum)
}

/// The addresses of a mapping and whether it can be written, from the first line of its entry (proc(5), maps).
fn mapping(line: &str) -> Option<(u64, u64, bool)> {
    let (addresses, rest) = line.split_once(' ')?;
    let (begin, end) = addresses.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    Some((address(begin)?, address(end)?, rest.starts_with("rw")))
}

fn figure(line: &str, name: &str) -> Option<u64> {
    let rest = line.strip_prefix(name)?;
    rest.split_whitespace().next()?.parse().ok()
}

/// The parent of each process (proc(5), field 4 of stat).
fn parents() -> Result<HashMap<u64, u64>> {
    let mut all = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        // It may have ended meanwhile.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        if let Some(parent) = rest.split(' ').nth(1).and_then(|field| field.parse().ok()) {
            all.insert(pid, parent);
        }
    }
    Ok(all)
}

/// A process and those above it.
fn lineage(parents: &HashMap<u64, u64>, pid: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(pid), |pid| parents.get(pid).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_s_memory_is_not_the_vmm_s() {
        // Begin and size in KiB, protection, what is anonymous.
        let mapping = |(begin, size, protection, anonymous): (u64, u64, &str, u64)| {
            let (begin, end) = (begin << 10, (begin + size) << 10);
            format!(
                "{begin:x}-{end:x} {protection} 00000000 00:00 0\nPss: 1 kB\nAnonymous: {anonymous} kB\n"
            )
        };
        let own = [
            (0, 132, "rw-p", 40),
            (132, 70 << 10, "r--p", 5),
            (100 << 10, 2048, "rw-p", 8),
        ];
        let own: String = own.into_iter().map(mapping).collect();
        assert_eq!(small_anonymous(&own), None);
        let guest = [
            (200 << 10, 4 << 10, "rw-p", 9000),
            (204 << 10, 60 << 10, "rw-p", 70),
        ];
        let guest: String = guest.into_iter().map(mapping).collect();
        assert_eq!(small_anonymous(&(own + &guest)), Some(53));
    }

    #[test]
    fn processes_have_their_ancestors() {
        let parents = HashMap::from([(1, 0), (7, 1), (9, 7)]);
        assert_eq!(lineage(&parents, 9).collect::<Vec<_>>(), [9, 7, 1, 0]);
    }
}
