//! The pods and containers the daemon knows, in memory, each backed by its record in the store.
//!
//! A record is read and changed under a lock that is never held over anything that waits. Writes to the store of
//! one entry are ordered: each writes the record as it then is, so the last one writes the last state.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use caisson_proto::cri;
use tokio::sync::watch;

use super::CriError;
use super::events::{Event, Events, Watcher};
use super::users::Users;
use crate::sandbox::{Sandbox, sentence};
use crate::store::{ContainerRecord, ContainerState, SandboxRecord, SandboxState, Store};

/// A sample of CPU use, from which a rate is computed.
#[derive(Clone, Copy, Debug)]
pub struct CpuSample {
    /// Nanoseconds of wall time.
    pub at: u64,
    /// Nanoseconds of CPU time.
    pub usage: u64,
}

/// A pod sandbox.
pub struct Pod {
    /// Its ID.
    pub id: String,
    /// When it was made: Unix time in nanoseconds.
    created_at: i64,
    record: Mutex<Arc<SandboxRecord>>,
    sandbox: Mutex<Option<Arc<dyn Sandbox>>>,
    persist: tokio::sync::Mutex<()>,
    /// Held shared while something is made in the pod, exclusively while the pod is taken apart.
    pub lifecycle: tokio::sync::RwLock<()>,
    /// The last CPU sample.
    pub cpu: Mutex<Option<CpuSample>>,
}

/// A container.
pub struct Container {
    /// Its ID.
    pub id: String,
    /// The pod it is in.
    pub pod: Arc<Pod>,
    /// When it was made: Unix time in nanoseconds.
    created_at: i64,
    record: Mutex<Arc<ContainerRecord>>,
    persist: tokio::sync::Mutex<()>,
    /// Held while the container is started or removed.
    pub lifecycle: tokio::sync::Mutex<()>,
    /// True once its end is in the record.
    pub exited: watch::Sender<bool>,
    /// The last CPU sample.
    pub cpu: Mutex<Option<CpuSample>>,
}

/// All pods and containers.
pub struct Registry {
    store: Store,
    users: Users,
    pods: RwLock<HashMap<String, Arc<Pod>>>,
    containers: RwLock<HashMap<String, Arc<Container>>>,
    events: Arc<Events>,
}

/// Locks what is only held for moments; a panic elsewhere leaves the data whole, as each change is one assignment.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Unix time in nanoseconds.
pub fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()
        .and_then(|d| i64::try_from(d.as_nanos()).ok())
        .unwrap_or(0)
}

impl Pod {
    /// A pod that goes by this record.
    pub fn new(record: SandboxRecord) -> Arc<Self> {
        Arc::new(Self {
            id: record.id.clone(),
            created_at: record.created_at,
            record: Mutex::new(Arc::new(record)),
            sandbox: Mutex::new(None),
            persist: tokio::sync::Mutex::new(()),
            lifecycle: tokio::sync::RwLock::new(()),
            cpu: Mutex::new(None),
        })
    }

    /// The record as it now is. What changes later does not change what was returned.
    pub fn record(&self) -> Arc<SandboxRecord> {
        lock(&self.record).clone()
    }

    /// Its state.
    pub fn state(&self) -> SandboxState {
        lock(&self.record).state
    }

    /// Changes the record in memory; [`Registry::save_pod`] writes it.
    pub fn change<T>(&self, change: impl FnOnce(&mut SandboxRecord) -> T) -> T {
        change(Arc::make_mut(&mut lock(&self.record)))
    }

    /// The sandbox, as long as there is one.
    pub fn sandbox(&self) -> Option<Arc<dyn Sandbox>> {
        lock(&self.sandbox).clone()
    }

    /// Sets or takes away the sandbox.
    pub fn set_sandbox(&self, sandbox: Option<Arc<dyn Sandbox>>) {
        *lock(&self.sandbox) = sandbox;
    }

    /// The sandbox of a pod that is ready.
    ///
    /// # Errors
    /// FAILED_PRECONDITION that says why it is not.
    pub fn ready(&self) -> Result<Arc<dyn Sandbox>, CriError> {
        let record = self.record();
        let why = match record.state {
            SandboxState::Ready => match self.sandbox() {
                Some(sandbox) => {
                    let ended = sandbox.ended().borrow().as_ref().map(sentence);
                    let silence = sandbox.health().borrow().silence().map(str::to_owned);
                    match ended.or(silence) {
                        None => return Ok(sandbox),
                        Some(reason) => format!("its sandbox is of no use ({reason})"),
                    }
                }
                None => "its sandbox is not connected".to_owned(),
            },
            SandboxState::Creating => "it is still being made".to_owned(),
            SandboxState::Stopping => "it is being stopped".to_owned(),
            SandboxState::Removing => "it is being removed".to_owned(),
            SandboxState::NotReady if record.reason.is_empty() => "it is stopped".to_owned(),
            SandboxState::NotReady => format!("it is stopped ({})", record.reason),
        };
        Err(CriError::precondition(format!(
            "pod {} is not ready: {why}; remove it and run it again",
            self.id
        )))
    }
}

impl Container {
    /// A container that goes by this record.
    pub fn new(record: ContainerRecord, pod: Arc<Pod>) -> Arc<Self> {
        let exited = matches!(
            record.state,
            ContainerState::Exited | ContainerState::Removing
        );
        Arc::new(Self {
            id: record.id.clone(),
            pod,
            created_at: record.created_at,
            record: Mutex::new(Arc::new(record)),
            persist: tokio::sync::Mutex::new(()),
            lifecycle: tokio::sync::Mutex::new(()),
            exited: watch::Sender::new(exited),
            cpu: Mutex::new(None),
        })
    }

    /// The record as it now is. What changes later does not change what was returned.
    pub fn record(&self) -> Arc<ContainerRecord> {
        lock(&self.record).clone()
    }

    /// Why its log cannot be written at this moment, if so.
    pub fn log_failure(&self) -> Option<String> {
        self.pod.sandbox()?.pod().control.log_failure(&self.id)
    }

    /// Its state.
    pub fn state(&self) -> ContainerState {
        lock(&self.record).state
    }

    /// Changes the record in memory; [`Registry::save_container`] writes it.
    pub fn change<T>(&self, change: impl FnOnce(&mut ContainerRecord) -> T) -> T {
        change(Arc::make_mut(&mut lock(&self.record)))
    }
}

impl Registry {
    /// An empty registry on a store. `users` are the host users that pod processes run as.
    pub fn new(store: Store, users: std::ops::Range<u32>) -> Self {
        Self {
            store,
            users: Users::new(users),
            pods: RwLock::default(),
            containers: RwLock::default(),
            events: Arc::default(),
        }
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Reserves the pod's name, gives it a user, writes its first record and makes it known.
    ///
    /// # Errors
    /// ALREADY_EXISTS with the ID that has the name; RESOURCE_EXHAUSTED when all users are in use; the disk fails.
    pub async fn create_pod(&self, record: SandboxRecord) -> Result<Arc<Pod>, CriError> {
        Ok(self.adopt_pod(self.reserve(record).await?))
    }

    /// The same for a machine that is started ahead of its pod: nobody knows it, and a later daemon takes what it finds
    /// by the record for a pod half made.
    ///
    /// # Errors
    /// See [`Registry::create_pod`].
    pub async fn reserve(&self, mut record: SandboxRecord) -> Result<SandboxRecord, CriError> {
        let user = self.users.take()?;
        record.user = user;
        if let Err(error) = self.store.create_sandbox(record.clone()).await {
            self.users.free(user);
            return Err(error.into());
        }
        Ok(record)
    }

    /// Makes what was reserved this pod: the ID and the user stay.
    ///
    /// # Errors
    /// ALREADY_EXISTS with the ID that has the name; the disk fails. It is then still reserved.
    pub async fn claim(
        &self,
        reserved: &Arc<SandboxRecord>,
        record: SandboxRecord,
    ) -> Result<Arc<Pod>, CriError> {
        let record = SandboxRecord {
            id: reserved.id.clone(),
            user: reserved.user,
            ..record
        };
        let renamed = self.store.rename_sandbox(reserved.clone(), record.clone());
        renamed.await?;
        Ok(self.adopt_pod(record))
    }

    /// Forgets what was reserved.
    ///
    /// # Errors
    /// The disk fails; it is then still reserved.
    pub async fn release(&self, reserved: &Arc<SandboxRecord>) -> Result<(), CriError> {
        self.store.delete_sandbox(reserved.clone()).await?;
        self.users.free(reserved.user);
        Ok(())
    }

    /// Makes a pod known whose record is in the store.
    pub fn adopt_pod(&self, record: SandboxRecord) -> Arc<Pod> {
        let pod = Pod::new(record);
        self.users.note(pod.record().user);
        self.write_pods().insert(pod.id.clone(), pod.clone());
        pod
    }

    /// Writes the pod's record as it is.
    ///
    /// # Errors
    /// The disk fails.
    pub async fn save_pod(&self, pod: &Pod) -> Result<(), CriError> {
        let _turn = pod.persist.lock().await;
        Ok(self.store.put_sandbox(pod.record()).await?)
    }

    /// Forgets a pod and frees its name. False if it was forgotten before.
    ///
    /// # Errors
    /// The disk fails; the pod is then still known.
    pub async fn delete_pod(&self, pod: &Pod) -> Result<bool, CriError> {
        let _turn = pod.persist.lock().await;
        self.store.delete_sandbox(pod.record()).await?;
        let known = self.write_pods().remove(&pod.id).is_some();
        if known {
            self.users.free(pod.record().user);
        }
        Ok(known)
    }

    /// Reserves the container's name, writes its first record and makes it known.
    ///
    /// # Errors
    /// See [`Registry::create_pod`].
    pub async fn create_container(
        &self,
        record: ContainerRecord,
        pod: Arc<Pod>,
    ) -> Result<Arc<Container>, CriError> {
        self.store.create_container(record.clone()).await?;
        Ok(self.adopt_container(record, pod))
    }

    /// Makes a container known whose record is in the store.
    pub fn adopt_container(&self, record: ContainerRecord, pod: Arc<Pod>) -> Arc<Container> {
        let container = Container::new(record, pod);
        self.write_containers()
            .insert(container.id.clone(), container.clone());
        container
    }

    /// Writes the container's record as it is.
    ///
    /// # Errors
    /// The disk fails.
    pub async fn save_container(&self, container: &Container) -> Result<(), CriError> {
        let _turn = container.persist.lock().await;
        Ok(self.store.put_container(container.record()).await?)
    }

    /// Forgets a container and frees its name. False if it was forgotten before.
    ///
    /// # Errors
    /// The disk fails; the container is then still known.
    pub async fn delete_container(&self, container: &Container) -> Result<bool, CriError> {
        let _turn = container.persist.lock().await;
        self.store.delete_container(container.record()).await?;
        Ok(self.write_containers().remove(&container.id).is_some())
    }

    /// The pod with this ID, or the only one whose ID begins so.
    ///
    /// # Errors
    /// NOT_FOUND; INVALID_ARGUMENT for a prefix of several.
    pub fn pod(&self, id: &str) -> Result<Arc<Pod>, CriError> {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        lookup(&pods, "pod", id)
    }

    /// The container with this ID, or the only one whose ID begins so.
    ///
    /// # Errors
    /// See [`Registry::pod`].
    pub fn container(&self, id: &str) -> Result<Arc<Container>, CriError> {
        let containers = self
            .containers
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        lookup(&containers, "container", id)
    }

    /// All pods, the newest first.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = pods.values().cloned().collect();
        all.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
        all
    }

    /// All containers, the newest first.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.containers_where(|_| true)
    }

    /// The containers of a pod, the newest first.
    pub fn containers_of(&self, pod_id: &str) -> Vec<Arc<Container>> {
        self.containers_where(|container| container.pod.id == pod_id)
    }

    fn containers_where(&self, wanted: impl Fn(&Container) -> bool) -> Vec<Arc<Container>> {
        let containers = self
            .containers
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut found: Vec<_> = containers
            .values()
            .filter(|container| wanted(container))
            .cloned()
            .collect();
        found.sort_by_key(|container| std::cmp::Reverse(container.created_at));
        found
    }

    /// Tells watchers what happened to a container.
    pub fn emit(&self, kind: cri::ContainerEventType, container: &Container) {
        self.events.emit(Event {
            kind,
            id: container.id.clone(),
            sandbox_id: container.pod.id.clone(),
            at: 0,
            last: None,
        });
    }

    /// Tells watchers what happened to a pod sandbox. With `last`, what it was before it was deleted.
    pub fn emit_of_pod(
        &self,
        kind: cri::ContainerEventType,
        pod: &Pod,
        last: Option<cri::PodSandboxStatus>,
    ) {
        self.events.emit(Event {
            kind,
            id: pod.id.clone(),
            sandbox_id: pod.id.clone(),
            at: 0,
            last,
        });
    }

    /// Whether anybody watches what happens.
    pub fn is_watched(&self) -> bool {
        self.events.is_watched()
    }

    /// Watches what happens from now on.
    pub fn watch(&self) -> Watcher {
        self.events.watch()
    }

    fn write_pods(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<String, Arc<Pod>>> {
        self.pods.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_containers(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn lookup<T>(map: &HashMap<String, Arc<T>>, what: &str, id: &str) -> Result<Arc<T>, CriError> {
    if id.is_empty() {
        return Err(CriError::invalid(format!("the request names no {what}")));
    }
    if let Some(found) = map.get(id) {
        return Ok(found.clone());
    }
    let mut matching = map.iter().filter(|(key, _)| key.starts_with(id));
    match (matching.next(), matching.next()) {
        (Some((_, found)), None) => Ok(found.clone()),
        (Some(_), Some(_)) => Err(CriError::invalid(format!(
            "{what} ID {id} is the beginning of several; write more of it"
        ))),
        (None, _) => Err(CriError::not_found(what, id)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_may_be_cut_short_while_it_is_unique() {
        let map = HashMap::from([
            ("abc1".to_owned(), Arc::new(1)),
            ("abd2".to_owned(), Arc::new(2)),
        ]);
        assert_eq!(*lookup(&map, "pod", "abc").unwrap(), 1);
        assert_eq!(*lookup(&map, "pod", "abd2").unwrap(), 2);
        assert_eq!(
            lookup(&map, "pod", "ab").unwrap_err().code,
            tonic::Code::InvalidArgument
        );
        assert_eq!(
            lookup(&map, "pod", "x").unwrap_err().code,
            tonic::Code::NotFound
        );
        assert_eq!(
            lookup(&map, "pod", "").unwrap_err().code,
            tonic::Code::InvalidArgument
        );
    }
}
