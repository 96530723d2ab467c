//! Clones that are started before their pods are known, so that a pod of the usual shape waits for its network and its
//! agent's work alone.
//!
//! Nothing has run in such a machine but the agent, which has been told nothing yet. It has the ID, the host user, the
//! directories and the network namespace of the pod that it will be. Its record is that of a pod that is being made, so
//! a daemon that comes later takes it back.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::super::registry::{lock, now};
use super::super::{Context, CriError, new_id};
use super::{identity, sandbox, size};
use crate::network::Port;
use crate::sandbox::microvm::{MicroVm, Shape};
use crate::sandbox::{Sandbox, SandboxPlan};
use crate::store::SandboxRecord;

/// The pause after a machine was taken, before the next one is started: who has taken it wants the processors for its
/// containers first.
const AFTER: Duration = Duration::from_secs(2);
/// The pause before a look whether the template is there now.
const NO_TEMPLATE: Duration = Duration::from_secs(1);
/// The pause after a machine that could not be started.
const FAILED: Duration = Duration::from_secs(10);

/// A machine that waits for its pod.
pub struct Ready {
    /// What is reserved for it.
    pub record: Arc<SandboxRecord>,
    /// Where its network will be.
    pub port: Port,
    /// The machine.
    pub vm: MicroVm,
    shape: Shape,
}

/// The machines that wait.
pub struct ReadyPool {
    most: usize,
    machines: Mutex<Vec<Ready>>,
    taken: Notify,
    closed: watch::Sender<bool>,
}

impl ReadyPool {
    /// One that is to hold so many.
    pub fn new(most: u32) -> Self {
        Self {
            most: most as usize,
            machines: Mutex::default(),
            taken: Notify::new(),
            closed: watch::Sender::default(),
        }
    }

    /// Tells [`keep_ready`] to come to its end.
    pub fn close(&self) {
        self.closed.send_replace(true);
    }

    /// The machine that has waited longest, if it has this shape.
    pub fn take(&self, shape: &Shape) -> Option<Ready> {
        let mut machines = lock(&self.machines);
        let first = machines.iter().position(|ready| ready.shape == *shape)?;
        let ready = machines.remove(first);
        self.taken.notify_one();
        Some(ready)
    }

    /// Lets a machine wait.
    pub fn put(&self, ready: Ready) {
        lock(&self.machines).push(ready);
    }

    fn count(&self) -> usize {
        lock(&self.machines).len()
    }

    /// Takes away what has ended meanwhile.
    fn ended(&self) -> Vec<Ready> {
        let mut machines = lock(&self.machines);
        machines
            .extract_if(.., |ready| ready.vm.ended().borrow().is_some())
            .collect()
    }
}

/// Keeps machines ready, as many as the configuration says, until the pool is closed; then ends those that wait: nobody will
/// ask for them.
pub async fn keep_ready(context: &Context) {
    let pool = &context.ready;
    let mut closed = pool.closed.subscribe();
    let mut said = String::new();
    loop {
        for ready in pool.ended() {
            give_back(context, &ready.record).await;
        }
        let pause = if pool.count() >= pool.most {
            tokio::select! {
                () = pool.taken.notified() => AFTER,
                _ = closed.wait_for(|closed| *closed) => Duration::ZERO,
            }
        } else {
            match start(context).await {
                Ok(Some(ready)) => {
                    tracing::info!(pod = ready.record.id, "a machine waits for its pod");
                    pool.put(ready);
                    said.clear();
                    Duration::ZERO
                }
                Ok(None) => NO_TEMPLATE,
                Err(error) => {
                    let error = error.to_string();
                    // Once: a node without a network yet stays so for a while.
                    if error != said {
                        tracing::warn!(error, "no machine can be kept ready; it is tried again");
                        said = error;
                    }
                    FAILED
                }
            }
        };
        let _ = tokio::time::timeout(pause, closed.wait_for(|closed| *closed)).await;
        if *closed.borrow() {
            break;
        }
    }
    let left = std::mem::take(&mut *lock(&pool.machines));
    futures::future::join_all(left.iter().map(|ready| give_back(context, &ready.record))).await;
}

/// Starts a machine of the usual shape; `None`: there is no template of it yet.
async fn start(context: &Context) -> Result<Option<Ready>, CriError> {
    let shape = size::usual_shape(&context.config.microvm)?;
    let templates = context.microvm.templates.as_ref();
    let Some(template) = templates.and_then(|all| all.of(&shape, &context.microvm)) else {
        return Ok(None);
    };
    let id = new_id();
    // No pod has an ID for its name: theirs have underscores.
    let record = SandboxRecord::first(id.clone(), id, now());
    let record = Arc::new(context.registry.reserve(record).await?);
    let started = async {
        let identity = identity(&record);
        let port = context.network.prepare(&identity, true, None).await?;
        let plan = SandboxPlan {
            id: record.id.clone(),
            port: Some(port.clone()),
            user: record.user,
            ..size::usual_plan(&context.config.microvm)?
        };
        let turn = context.boots.acquire().await;
        let vm = MicroVm::start_ahead(&plan, &context.microvm, &template).await?;
        drop(turn);
        Ok::<_, CriError>((port, vm))
    };
    match started.await {
        Ok((port, vm)) => Ok(Some(Ready {
            record,
            port,
            vm,
            shape,
        })),
        Err(error) => {
            give_back(context, &record).await;
            Err(error)
        }
    }
}

/// Takes back all that a machine has, and what was reserved for it.
async fn give_back(context: &Context, record: &Arc<SandboxRecord>) {
    let undone = async {
        sandbox::take_back(context, record).await?;
        context.registry.release(record).await
    };
    if let Err(error) = undone.await {
        tracing::warn!(pod = record.id, %error, "a machine that was kept ready is left; the next daemon removes it");
    }
}
