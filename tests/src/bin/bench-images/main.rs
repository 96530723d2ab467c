//! Measures images and root file systems of Caisson side by side with containerd, in turns, on one machine.
//!
//! `scripts/bench images` prepares the machine (see there for what is measured) and calls this:
//!
//! ```text
//! bench-images CAISSON_SOCKET CONTAINERD_SOCKET REGISTRY REGISTRY_LOG LOGS PULL_MB LARGE_MB FILE_MB FILES TAR_FILES PODS ROUNDS [PART,...]
//! ```

mod node;
mod table;

use std::path::{Path, PathBuf};
use std::time::Duration;

use caisson_tests::runtime::{Container, Pod, Result, Runtime, Task};
use node::Registry;
use table::{Table, median, met, seconds};

const MB: u64 = 1_000_000;
const MIB: u64 = 1 << 20;
/// The size of the file in the image `shared`.
const SHARED: u64 = 40 * MB;
/// How many containers are made of each image, to compare small and large ones.
const CREATES: usize = 9;

struct Bench {
    ours: Runtime,
    theirs: Runtime,
    registry: String,
    registry_log: PathBuf,
    sizes: Sizes,
    table: Table,
}

struct Sizes {
    pull_mb: u64,
    large_mb: u64,
    file_mb: u64,
    files: u64,
    tar_files: u64,
    pods: u64,
    rounds: u64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [
        caisson,
        containerd,
        registry,
        registry_log,
        logs,
        numbers @ ..,
    ] = &arguments[..]
    else {
        return Err("this is called by scripts/bench images".into());
    };
    let parts = numbers
        .get(7)
        .map_or("machine,pull,create,files,pods", String::as_str);
    let numbers: Vec<u64> = numbers
        .iter()
        .take(7)
        .map(|number| number.parse())
        .collect::<std::result::Result<_, _>>()?;
    let [pull_mb, large_mb, file_mb, files, tar_files, pods, rounds] = numbers[..] else {
        return Err("seven numbers are needed; see scripts/bench images".into());
    };
    let logs = Path::new(logs);
    let mut bench = Bench {
        ours: Runtime::new("caisson", Path::new(caisson), logs),
        theirs: Runtime::new("containerd", Path::new(containerd), logs),
        registry: format!("{registry}/bench"),
        registry_log: registry_log.into(),
        sizes: Sizes {
            pull_mb,
            large_mb,
            file_mb,
            files,
            tar_files,
            pods,
            rounds,
        },
        table: Table::default(),
    };
    for part in parts.split(',') {
        match part {
            "machine" => bench.machine().await?,
            "pull" => bench.pull().await?,
            "create" => bench.create().await?,
            "files" => bench.files().await?,
            "pods" => bench.pods().await?,
            other => return Err(format!("there is no part {other}").into()),
        }
    }
    println!();
    bench.table.print();
    Ok(())
}

impl Bench {
    fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.registry)
    }

    fn both(&self) -> [&Runtime; 2] {
        [&self.ours, &self.theirs]
    }

    /// What the processor itself makes of the same work in a guest and beside it, without files and disks: no microVM can be faster
    /// than that. Where KVM is emulated it says how much of a ratio is the emulator's.
    async fn machine(&mut self) -> Result<()> {
        let image = self.image("small");
        let steps = [
            (
                "a loop in the shell",
                "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done",
            ),
            (
                "100,000 system calls",
                "dd if=/dev/zero of=/dev/null bs=1 count=50000 2>&1",
            ),
            (
                "16 MB of memory, 16 times",
                "dd if=/dev/zero of=/dev/null bs=16M count=16 2>&1",
            ),
            (
                "100 processes",
                "i=0; while [ $i -lt 100 ]; do (:); i=$((i+1)); done",
            ),
        ];
        let mut times = vec![[vec![], vec![]]; steps.len()];
        for (number, runtime) in self.both().into_iter().enumerate() {
            runtime.pull(&image).await?;
            let pod = runtime.pod(256 * MIB).await?;
            let container = runtime.run(&pod, of(&image)).await?;
            // The first of each touches the memory that the others find.
            for round in 0..=CREATES {
                for (step, (_, script)) in steps.iter().enumerate() {
                    let time = runtime.time(&container, script).await?;
                    if round > 0 {
                        times[step][number].push(time);
                    }
                }
            }
            runtime.remove(pod).await?;
        }
        for ((what, _), [ours, theirs]) in steps.into_iter().zip(&times) {
            self.table
                .reference(format!("reference: {what}"), ours, theirs);
        }
        Ok(())
    }

    /// Pull and unpack, and a second image that shares layers with the first.
    async fn pull(&mut self) -> Result<()> {
        let (first, second) = (self.image("pull:1"), self.image("pull:2"));
        let log = self.registry_log.clone();
        let (mut times, mut again) = ([vec![], vec![]], [vec![], vec![]]);
        let mut moved = [(0, 0), (0, 0)];
        for _ in 0..self.sizes.rounds {
            for (number, runtime) in self.both().into_iter().enumerate() {
                node::drop_caches()?;
                let time = runtime.pull(&first).await?;
                eprintln!("{}: pulled in {}", runtime.name, seconds(time));
                times[number].push(time);
                let sent = Registry::watch(&log)?;
                again[number].push(runtime.pull(&second).await?);
                moved[number] = sent.sent()?;
                runtime.remove_image(&first).await?;
                runtime.remove_image(&second).await?;
            }
        }
        let mb = self.sizes.pull_mb;
        let what = format!("pull and unpack {mb} MB in 10 layers");
        self.table.compare(what, &times[0], &times[1], 1.0);
        self.table
            .compare("second image, 9 layers shared", &again[0], &again[1], 1.0);
        // One layer is a ninth of it, uncompressed; and there is its configuration.
        let most = mb * MB / 9;
        self.table.add([
            "  of it moved".into(),
            format!("{} blobs, {:.1} MB", moved[0].0, megabytes(moved[0].1)),
            format!("{} blobs, {:.1} MB", moved[1].0, megabytes(moved[1].1)),
            String::new(),
            "the tenth layer, the configuration".into(),
            met(moved[0].0 == 2 && moved[0].1 <= most),
        ]);
        Ok(())
    }

    /// CreateContainer of a small and of a large image.
    async fn create(&mut self) -> Result<()> {
        let images = [self.image("small"), self.image("large")];
        let mut medians = vec![];
        for runtime in self.both() {
            for image in &images {
                runtime.pull(image).await?;
            }
            let pod = runtime.pod(256 * MIB).await?;
            let mut times = [vec![], vec![]];
            for round in 0..=CREATES {
                for (number, image) in images.iter().enumerate() {
                    let (container, time) = runtime.create(&pod, of(image)).await?;
                    // The first of each mounts what the others share.
                    if round > 0 {
                        times[number].push(time);
                    }
                    runtime.remove_container(container).await?;
                }
            }
            runtime.remove(pod).await?;
            medians.push(times.map(|times| median(&times)));
        }
        let growth = |[small, large]: [Duration; 2]| large.as_secs_f64() / small.as_secs_f64();
        for (number, name) in [
            (0, "10 MB".to_owned()),
            (1, format!("{} MB", self.sizes.large_mb)),
        ] {
            self.table.add([
                format!("CreateContainer, image of {name}"),
                seconds(medians[0][number]),
                seconds(medians[1][number]),
                format!(
                    "{:.2}",
                    medians[1][number].as_secs_f64() / medians[0][number].as_secs_f64()
                ),
                String::new(),
                String::new(),
            ]);
        }
        self.table.add([
            "  large to small".into(),
            format!("{:.2}", growth(medians[0])),
            format!("{:.2}", growth(medians[1])),
            String::new(),
            "<= 1.10".into(),
            met(growth(medians[0]) <= 1.10),
        ]);
        Ok(())
    }

    /// Reading and writing in a container.
    async fn files(&mut self) -> Result<()> {
        let image = self.image("work");
        let memory = 512 * MIB + 2 * self.sizes.file_mb * MB;
        let (mb, files, tar_files) = (self.sizes.file_mb, self.sizes.files, self.sizes.tar_files);
        let find = "find /files | wc -l";
        let read = "dd if=/big of=/dev/null bs=1M 2>/dev/null";
        let steps = [
            (format!("find over {files} files, cold"), find, true),
            (format!("find over {files} files, warm"), find, false),
            (format!("read {mb} MB, cold"), read, true),
            (format!("read {mb} MB, warm"), read, false),
            (
                format!("tar x of {tar_files} files"),
                "mkdir /new; tar xf /small.tar -C /new",
                true,
            ),
            ("rm -r of them".into(), "rm -r /new", false),
        ];
        for runtime in self.both() {
            let time = runtime.pull(&image).await?;
            eprintln!("{}: pulled {image} in {}", runtime.name, seconds(time));
        }
        let mut times = vec![[vec![], vec![]]; steps.len()];
        let mut counts = vec![];
        for _ in 0..self.sizes.rounds {
            for (number, runtime) in self.both().into_iter().enumerate() {
                let pod = runtime.pod(memory).await?;
                let container = runtime.run(&pod, of(&image)).await?;
                for (step, (what, script, cold)) in steps.iter().enumerate() {
                    if *cold {
                        node::drop_caches()?;
                    }
                    let time = runtime.time(&container, script).await?;
                    eprintln!("{}: {what}: {}", runtime.name, seconds(time));
                    times[step][number].push(time);
                }
                counts.push(runtime.exec(&container, find).await?);
                counts.dedup();
                runtime.remove(pod).await?;
            }
        }
        if counts.len() != 1 {
            return Err(format!("find found different numbers of files: {counts:?}").into());
        }
        for ((what, ..), [ours, theirs]) in steps.into_iter().zip(&times) {
            self.table.compare(what, ours, theirs, 0.9);
        }
        Ok(())
    }

    /// Many pods of one image that all read it.
    async fn pods(&mut self) -> Result<()> {
        let image = self.image("shared");
        let count = self.sizes.pods;
        let ours = &self.ours;
        ours.pull(&image).await?;
        let mut pods: Vec<(Pod, Container)> = vec![];
        for _ in 0..count {
            let pod = ours.pod(96 * MIB).await?;
            let container = ours.run(&pod, of(&image)).await?;
            pods.push((pod, container));
        }
        node::drop_caches()?;
        let cache = node::page_cache()?;
        let (_, memory) = node::memory_of("caisson-vmm")?;
        let mut after_one = 0;
        for (number, (_, container)) in pods.iter().enumerate() {
            ours.exec(container, "cat /big >/dev/null").await?;
            if number == 0 {
                after_one = node::page_cache()?.saturating_sub(cache);
            }
        }
        let grown = node::page_cache()?.saturating_sub(cache);
        let layers = node::open_layers("caisson-vmm")?;
        let cached = layers.iter().map(|layer| layer.cached).sum::<u64>();
        let open = layers.iter().map(|layer| layer.processes).min();
        let (processes, more) = node::memory_of("caisson-vmm")?;
        for (pod, _) in pods {
            ours.remove(pod).await?;
        }
        let times = grown as f64 / SHARED as f64;
        self.table.add([
            format!(
                "{count} pods read one file of {} MB: page cache grows by",
                SHARED / MB
            ),
            format!("{:.1} MB", megabytes(grown)),
            String::new(),
            format!("{times:.2}"),
            "once (<= 1.1 of it)".into(),
            met(processes as u64 == count && times <= 1.1),
        ]);
        self.table.add([
            "  after the first pod; of the layers' files in the cache".into(),
            format!("{:.1}, {:.1} MB", megabytes(after_one), megabytes(cached)),
            String::new(),
            String::new(),
            format!("{} files, each open in all pods", layers.len()),
            met(open == Some(processes) && cached <= SHARED + SHARED / 10),
        ]);
        self.table.add([
            "  memory of a pod process before and after (PSS)".into(),
            format!(
                "{:.1}, {:.1} MB",
                megabytes(memory) / processes as f64,
                megabytes(more) / processes as f64
            ),
            String::new(),
            String::new(),
            String::new(),
            String::new(),
        ]);
        Ok(())
    }
}

/// A container that does what its image says.
fn of(image: &str) -> Task<'_> {
    Task {
        image,
        ..Task::default()
    }
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / MB as f64
}
