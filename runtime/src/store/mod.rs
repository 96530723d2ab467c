//! What the daemon remembers: records of pod sandboxes and containers in an embedded transactional database.
//!
//! A record is written before the work it announces and again when that is done, each time in a transaction of
//! its own that is on the disk when the call returns. A name is reserved in the transaction that writes the first record.

mod records;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use records::{
    ContainerRecord, ContainerState, NetworkRecord, Proto, SandboxRecord, SandboxState, UserRecord,
};

type Table = TableDefinition<'static, &'static str, &'static [u8]>;

const SANDBOXES: Table = TableDefinition::new("sandboxes");
const CONTAINERS: Table = TableDefinition::new("containers");
/// Reserved names: "pod NAME" or "container NAME" to the ID that holds it.
const NAMES: TableDefinition<'static, &'static str, &'static str> = TableDefinition::new("names");

/// How long a daemon waits for the lock of the one before it.
const HANDOVER: Duration = Duration::from_secs(3);

/// Why the store could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be opened.
    #[error(
        "cannot open the store {path}: {cause}; another daemon may use it, or the file is damaged"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// A transaction failed.
    #[error("cannot {what} in the store: {cause}; is the disk full?")]
    Transaction {
        /// What was tried.
        what: &'static str,
        /// Why.
        cause: String,
    },
    /// A record cannot be read.
    #[error("the store holds a record of {kind} {id} that cannot be read: {cause}")]
    Corrupt {
        /// "pod" or "container".
        kind: &'static str,
        /// Its ID.
        id: String,
        /// Why.
        cause: String,
    },
    /// The name belongs to another.
    #[error("the {kind} name {name} is in use by {id}; remove that {kind} or choose another name")]
    NameInUse {
        /// "pod" or "container".
        kind: &'static str,
        /// The name.
        name: String,
        /// Who has it.
        id: String,
    },
}

/// A kind of record.
trait Record: Serialize + DeserializeOwned {
    const KIND: &'static str;
    const TABLE: Table;
    fn id(&self) -> &str;
    fn name(&self) -> &str;
}

impl Record for SandboxRecord {
    const KIND: &'static str = "pod";
    const TABLE: Table = SANDBOXES;
    fn id(&self) -> &str {
        &self.id
    }
    fn name(&self) -> &str {
        &self.name
    }
}

impl Record for ContainerRecord {
    const KIND: &'static str = "container";
    const TABLE: Table = CONTAINERS;
    fn id(&self) -> &str {
        &self.id
    }
    fn name(&self) -> &str {
        &self.name
    }
}

/// The store. Cheap to clone.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    path: PathBuf,
    /// `None` after a failure of the disk: redb takes nothing more then, until the file is opened anew.
    database: RwLock<Option<Database>>,
}

impl Store {
    /// Opens the database, or makes it.
    ///
    /// # Errors
    /// It is in use by another process, damaged, or the disk fails.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Ok(Self(Arc::new(Inner {
            database: RwLock::new(Some(open(path)?)),
            path: path.to_owned(),
        })))
    }

    /// All pod sandboxes.
    ///
    /// # Errors
    /// The disk fails, or a record cannot be read.
    pub fn sandboxes(&self) -> Result<Vec<SandboxRecord>, StoreError> {
        self.all()
    }

    /// All containers.
    ///
    /// # Errors
    /// See [`Store::sandboxes`].
    pub fn containers(&self) -> Result<Vec<ContainerRecord>, StoreError> {
        self.all()
    }

    /// Reserves the sandbox's name and writes its first record.
    ///
    /// # Errors
    /// [`StoreError::NameInUse`] with the ID that has the name; the disk fails.
    pub async fn create_sandbox(&self, record: SandboxRecord) -> Result<(), StoreError> {
        self.run(move |database| create(database, &record)).await
    }

    /// Reserves the sandbox's name, frees the one it had before, and writes its record.
    ///
    /// # Errors
    /// See [`Store::create_sandbox`]; it then has the old name and record.
    pub async fn rename_sandbox(
        &self,
        before: Arc<SandboxRecord>,
        record: SandboxRecord,
    ) -> Result<(), StoreError> {
        self.run(move |database| rename(database, &*before, &record))
            .await
    }

    /// Writes a sandbox's record.
    ///
    /// # Errors
    /// The disk fails.
    pub async fn put_sandbox(&self, record: Arc<SandboxRecord>) -> Result<(), StoreError> {
        self.run(move |database| put(database, &*record)).await
    }

    /// Forgets a sandbox and frees its name. Idempotent.
    ///
    /// # Errors
    /// The disk fails.
    pub async fn delete_sandbox(&self, record: Arc<SandboxRecord>) -> Result<(), StoreError> {
        self.run(move |database| delete(database, &*record)).await
    }

    /// Reserves the container's name and writes its first record.
    ///
    /// # Errors
    /// See [`Store::create_sandbox`].
    pub async fn create_container(&self, record: ContainerRecord) -> Result<(), StoreError> {
        self.run(move |database| create(database, &record)).await
    }

    /// Writes a container's record.
    ///
    /// # Errors
    /// The disk fails.
    pub async fn put_container(&self, record: Arc<ContainerRecord>) -> Result<(), StoreError> {
        self.run(move |database| put(database, &*record)).await
    }

    /// Forgets a container and frees its name. Idempotent.
    ///
    /// # Errors
    /// The disk fails.
    pub async fn delete_container(&self, record: Arc<ContainerRecord>) -> Result<(), StoreError> {
        self.run(move |database| delete(database, &*record)).await
    }

    /// Runs a transaction where it may wait for the disk; once more on the file opened anew if it fails.
    async fn run(
        &self,
        work: impl Fn(&Database) -> Result<(), StoreError> + Send + 'static,
    ) -> Result<(), StoreError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || {
            let result = store.with(&work);
            let Err(StoreError::Transaction { .. }) = result else {
                return result;
            };
            store.reopen()?;
            store.with(&work)
        })
        .await
        .unwrap_or_else(|error| Err(failed("finish a transaction", error)))
    }

    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let database = self.0.database.read();
        match &*database.unwrap_or_else(PoisonError::into_inner) {
            Some(database) => work(database),
            None => Err(failed("begin a transaction", "the disk failed before")),
        }
    }

    fn reopen(&self) -> Result<(), StoreError> {
        let database = self.0.database.write();
        let mut database = database.unwrap_or_else(PoisonError::into_inner);
        // Closed first: the file is locked as long as it is open.
        *database = None;
        *database = Some(open(&self.0.path)?);
        Ok(())
    }

    fn all<R: Record>(&self) -> Result<Vec<R>, StoreError> {
        self.with(all)
    }
}

fn open(path: &Path) -> Result<Database, StoreError> {
    let failed = |cause: String| StoreError::Open {
        path: path.to_owned(),
        cause,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|e| failed(e.to_string()))?;
    }
    let database = create_or_wait(path).map_err(|e| failed(e.to_string()))?;
    let begin = database.begin_write().map_err(|e| failed(e.to_string()))?;
    {
        begin
            .open_table(SANDBOXES)
            .map_err(|e| failed(e.to_string()))?;
        begin
            .open_table(CONTAINERS)
            .map_err(|e| failed(e.to_string()))?;
        begin.open_table(NAMES).map_err(|e| failed(e.to_string()))?;
    }
    begin.commit().map_err(|e| failed(e.to_string()))?;
    Ok(database)
}

/// A process that a killed daemon was about to start holds the lock, too, until it is another program. So one that is
/// held is asked for again for a while.
fn create_or_wait(path: &Path) -> Result<Database, DatabaseError> {
    let begun = Instant::now();
    loop {
        match Database::create(path) {
            Err(DatabaseError::DatabaseAlreadyOpen) if begun.elapsed() < HANDOVER => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

fn all<R: Record>(database: &Database) -> Result<Vec<R>, StoreError> {
    const WHAT: &str = "read the records";
    let read = database.begin_read().map_err(|e| failed(WHAT, e))?;
    let table = read.open_table(R::TABLE).map_err(|e| failed(WHAT, e))?;
    let mut records = Vec::new();
    for entry in table.iter().map_err(|e| failed(WHAT, e))? {
        let (id, bytes) = entry.map_err(|e| failed(WHAT, e))?;
        records.push(serde_json::from_slice(bytes.value()).map_err(|error| {
            StoreError::Corrupt {
                kind: R::KIND,
                id: id.value().to_owned(),
                cause: error.to_string(),
            }
        })?);
    }
    Ok(records)
}

fn create<R: Record>(database: &Database, record: &R) -> Result<(), StoreError> {
    rename(database, record, record)
}

/// Writes a record under its name, which is new, and frees the one it had before, if that was another.
fn rename<R: Record>(database: &Database, before: &R, record: &R) -> Result<(), StoreError> {
    const WHAT: &str = "reserve a name";
    let write = database.begin_write().map_err(|e| failed(WHAT, e))?;
    {
        let mut names = write.open_table(NAMES).map_err(|e| failed(WHAT, e))?;
        let key = name_key(record);
        let holder = names
            .get(key.as_str())
            .map_err(|e| failed(WHAT, e))?
            .map(|id| id.value().to_owned());
        if let Some(id) = holder {
            return Err(StoreError::NameInUse {
                kind: R::KIND,
                name: record.name().to_owned(),
                id,
            });
        }
        names
            .insert(key.as_str(), record.id())
            .map_err(|e| failed(WHAT, e))?;
        let key_before = name_key(before);
        if key_before != key {
            names
                .remove(key_before.as_str())
                .map_err(|e| failed(WHAT, e))?;
        }
        let mut table = write.open_table(R::TABLE).map_err(|e| failed(WHAT, e))?;
        table
            .insert(record.id(), encode(record)?.as_slice())
            .map_err(|e| failed(WHAT, e))?;
    }
    write.commit().map_err(|e| failed(WHAT, e))
}

fn put<R: Record>(database: &Database, record: &R) -> Result<(), StoreError> {
    const WHAT: &str = "write a record";
    let write = database.begin_write().map_err(|e| failed(WHAT, e))?;
    {
        let mut table = write.open_table(R::TABLE).map_err(|e| failed(WHAT, e))?;
        table
            .insert(record.id(), encode(record)?.as_slice())
            .map_err(|e| failed(WHAT, e))?;
    }
    write.commit().map_err(|e| failed(WHAT, e))
}

fn delete<R: Record>(database: &Database, record: &R) -> Result<(), StoreError> {
    const WHAT: &str = "delete a record";
    let write = database.begin_write().map_err(|e| failed(WHAT, e))?;
    {
        let mut table = write.open_table(R::TABLE).map_err(|e| failed(WHAT, e))?;
        table.remove(record.id()).map_err(|e| failed(WHAT, e))?;
        let mut names = write.open_table(NAMES).map_err(|e| failed(WHAT, e))?;
        let key = name_key(record);
        // The name may have been freed and taken by another since.
        let ours = names
            .get(key.as_str())
            .map_err(|e| failed(WHAT, e))?
            .is_some_and(|id| id.value() == record.id());
        if ours {
            names.remove(key.as_str()).map_err(|e| failed(WHAT, e))?;
        }
    }
    write.commit().map_err(|e| failed(WHAT, e))
}

fn name_key<R: Record>(record: &R) -> String {
    format!("{} {}", R::KIND, record.name())
}

fn encode<R: Record>(record: &R) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|error| failed("encode a record", error))
}

fn failed(what: &'static str, cause: impl std::fmt::Display) -> StoreError {
    StoreError::Transaction {
        what,
        cause: cause.to_string(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use caisson_proto::cri;

    pub(crate) fn sandbox(id: &str, name: &str) -> SandboxRecord {
        SandboxRecord {
            id: id.into(),
            name: name.into(),
            handler: String::new(),
            kind: Default::default(),
            created_at: 7,
            state: SandboxState::Creating,
            reason: String::new(),
            silence: None,
            config: Proto(cri::PodSandboxConfig {
                hostname: "web".into(),
                ..Default::default()
            }),
            network: None,
            user: 0,
        }
    }

    // must-test: a non-idempotent create leaks VMs: a daemon that dies between the record and the work finds the record
    #[tokio::test]
    async fn a_record_outlives_a_crash_at_every_point() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let record = sandbox("a1", "web");
        {
            let store = Store::open(&path).unwrap();
            store.create_sandbox(record.clone()).await.unwrap();
        } // the daemon dies before the work
        {
            let store = Store::open(&path).unwrap();
            assert_eq!(store.sandboxes().unwrap(), vec![record.clone()]);
            let mut ready = record.clone();
            ready.state = SandboxState::Ready;
            store.put_sandbox(ready.into()).await.unwrap();
        } // … and after it
        {
            let store = Store::open(&path).unwrap();
            let found = store.sandboxes().unwrap();
            assert_eq!(found[0].state, SandboxState::Ready);
            assert_eq!(found[0].config.0.hostname, "web");
            store.delete_sandbox(record.clone().into()).await.unwrap();
            store.delete_sandbox(record.clone().into()).await.unwrap();
        }
        let store = Store::open(&path).unwrap();
        assert!(store.sandboxes().unwrap().is_empty());
        store.create_sandbox(record).await.unwrap();
    }

    #[tokio::test]
    async fn a_name_in_use_names_its_holder_and_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("s")).unwrap();
        store.create_sandbox(sandbox("a1", "web")).await.unwrap();
        let error = store
            .create_sandbox(sandbox("b2", "web"))
            .await
            .unwrap_err();
        assert!(
            matches!(&error, StoreError::NameInUse { id, .. } if id == "a1"),
            "{error}"
        );
        assert_eq!(store.sandboxes().unwrap().len(), 1);
        // A late delete of one that never held the name does not free it.
        store
            .delete_sandbox(sandbox("b2", "web").into())
            .await
            .unwrap();
        assert!(store.create_sandbox(sandbox("c3", "web")).await.is_err());
    }

    #[tokio::test]
    async fn a_new_name_frees_the_old_one_or_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("s")).unwrap();
        let before = Arc::new(sandbox("a1", "a1"));
        store.create_sandbox((*before).clone()).await.unwrap();
        store.create_sandbox(sandbox("b2", "web")).await.unwrap();
        let taken = store.rename_sandbox(before.clone(), sandbox("a1", "web"));
        assert!(matches!(taken.await, Err(StoreError::NameInUse { .. })));
        assert!(store.create_sandbox(sandbox("c3", "a1")).await.is_err());
        let free = store.rename_sandbox(before, sandbox("a1", "db"));
        free.await.unwrap();
        assert!(store.create_sandbox(sandbox("c3", "db")).await.is_err());
        store.create_sandbox(sandbox("c3", "a1")).await.unwrap();
        assert_eq!(store.sandboxes().unwrap().len(), 3);
    }

    #[tokio::test]
    async fn of_many_at_once_one_gets_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("s")).unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..16 {
            let store = store.clone();
            tasks.spawn(async move {
                store
                    .create_sandbox(sandbox(&format!("id{n}"), "web"))
                    .await
            });
        }
        let won = tasks.join_all().await.iter().filter(|r| r.is_ok()).count();
        assert_eq!(won, 1);
    }

    #[test]
    fn a_second_daemon_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _first = Store::open(&path).unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::Open { .. })));
    }

    #[test]
    fn a_lock_that_is_given_up_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = Store::open(&path).unwrap();
        let last = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(first);
        });
        Store::open(&path).unwrap();
        last.join().unwrap();
    }
}
