//! Network configuration lists (CNI 1.1.0, section 1).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// The most bytes of a configuration file or a plugin's answer.
pub const MAX_JSON: u64 = 1 << 20;
/// The most plugins in a list.
const MAX_PLUGINS: usize = 32;
/// The versions of the CNI specification that are spoken, oldest first.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A plugin's part of a list, as it is in the file.
pub type Plugin = Map<String, Value>;

/// A network configuration list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkList {
    /// The version that is spoken with its plugins.
    #[serde(rename = "cniVersion")]
    pub version: String,
    /// The network's name.
    pub name: String,
    /// The plugins, in the order of ADD.
    pub plugins: Vec<Plugin>,
    /// CHECK must not be called.
    #[serde(rename = "disableCheck", default)]
    pub disable_check: bool,
    /// GC must not be called.
    #[serde(rename = "disableGC", default)]
    pub disable_gc: bool,
}

/// What a file may say in addition.
#[derive(Deserialize)]
struct File {
    #[serde(rename = "cniVersion", default)]
    version: String,
    #[serde(rename = "cniVersions", default)]
    versions: Vec<String>,
    name: String,
    #[serde(default)]
    plugins: Vec<Plugin>,
    #[serde(rename = "disableCheck", default)]
    disable_check: bool,
    #[serde(rename = "disableGC", default)]
    disable_gc: bool,
    #[serde(rename = "loadOnlyInlinedPlugins", default)]
    only_inlined: bool,
}

impl NetworkList {
    /// Whether the list's version is at least this one, which is one of those that are spoken.
    pub fn speaks(&self, version: &str) -> bool {
        rank(&self.version) >= rank(version)
    }
}

/// The name of a plugin's program.
pub fn plugin_type(plugin: &Plugin) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or("")
}

/// By what the file system knows of a file it is told that nobody has changed it.
type Mark = (u64, u64, i64, i64, u64);

fn mark(path: &Path) -> Option<Mark> {
    let known = fs::metadata(path).ok()?;
    Some((
        known.dev(),
        known.ino(),
        known.mtime(),
        known.mtime_nsec(),
        known.len(),
    ))
}

/// What a directory was when its first list was read. As long as it is the same, so is the list.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    dir: (PathBuf, Option<Mark>),
    file: (PathBuf, Option<Mark>),
}

impl Seen {
    /// The directory and its file as they are now.
    pub fn now(dir: &Path, file: &Path) -> Self {
        let marked = |path: &Path| (path.to_owned(), mark(path));
        Self {
            dir: marked(dir),
            file: marked(file),
        }
    }

    /// Whether nothing has changed since.
    pub fn still(&self) -> bool {
        let same = |(path, was): &(PathBuf, Option<Mark>)| was.is_some() && mark(path) == *was;
        same(&self.dir) && same(&self.file)
    }
}

/// Reads the first list in a directory, by the file's name.
///
/// # Errors
/// A sentence that says what is missing or wrong, and where.
pub fn first(dir: &Path) -> Result<(PathBuf, NetworkList), String> {
    let files = files(dir, &["conflist", "conf", "json"]).map_err(|e| {
        format!(
            "{} cannot be read ({e}); put a .conflist file there",
            dir.display()
        )
    })?;
    let file = files.into_iter().next().ok_or_else(|| {
        format!(
            "{} has no .conflist, .conf or .json file; put one there",
            dir.display()
        )
    })?;
    match read(&file) {
        Ok(list) => Ok((file, list)),
        Err(why) => Err(format!("{}: {why}", file.display())),
    }
}

/// A network, for the fuzz target `config_files`; the sentence of what is wrong with it.
#[cfg(any(test, fuzzing))]
pub fn fuzz(text: &str) -> Option<String> {
    let value = match serde_json::from_str(text) {
        Ok(value) => value,
        Err(error) => return Some(error.to_string()),
    };
    match parse(Path::new("/nonexistent/10-fuzz.conflist"), value) {
        Ok(list) => {
            assert!((1..=MAX_PLUGINS).contains(&list.plugins.len()));
            None
        }
        Err(sentence) => Some(sentence),
    }
}

/// The files of a directory with one of these extensions, by name.
fn files(dir: &Path, extensions: &[&str]) -> std::io::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extensions.iter().any(|known| extension == *known))
        })
        .collect();
    files.sort();
    Ok(files)
}

/// Reads a list, or a single plugin's configuration as a list of one.
fn read(path: &Path) -> Result<NetworkList, String> {
    parse(path, json_file(path)?)
}

fn parse(path: &Path, value: Value) -> Result<NetworkList, String> {
    let whole = value.get("plugins").is_some() || value.get("type").is_none();
    let file: File = if whole {
        serde_json::from_value(value)
    } else {
        let of = |key: &str| value.get(key).cloned();
        serde_json::from_value(json!({
            "cniVersion": of("cniVersion").unwrap_or_else(|| "".into()),
            "name": of("name").unwrap_or(Value::Null),
            "plugins": [value],
            "loadOnlyInlinedPlugins": true,
        }))
    }
    .map_err(|e| format!("not a CNI network: {e}"))?;
    if !is_name(&file.name) {
        return Err(format!(
            "the name {:?} is not letters, digits, _, . and -, beginning with a letter or digit",
            file.name
        ));
    }
    let version = version(&file)?;
    let mut plugins = file.plugins;
    if !file.only_inlined {
        plugins.extend(beside(path, &file.name)?);
    }
    if plugins.is_empty() || plugins.len() > MAX_PLUGINS {
        return Err(format!(
            "it has {} plugins; 1 to {MAX_PLUGINS} are possible",
            plugins.len()
        ));
    }
    Ok(NetworkList {
        version,
        name: file.name,
        plugins,
        disable_check: file.disable_check,
        disable_gc: file.disable_gc,
    })
}

/// Plugins in files of their own, in the directory with the network's name beside the list's file.
fn beside(path: &Path, name: &str) -> Result<Vec<Plugin>, String> {
    let dir = path.with_file_name(name);
    let found = match files(&dir, &["conf"]) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => found.map_err(|e| format!("{} cannot be read: {e}", dir.display()))?,
    };
    found
        .iter()
        .take(MAX_PLUGINS + 1)
        .map(|file| match json_file(file)? {
            Value::Object(plugin) => Ok(plugin),
            _ => Err("it is not an object".to_owned()),
        })
        .zip(&found)
        .map(|(plugin, file)| plugin.map_err(|why| format!("{}: {why}", file.display())))
        .collect()
}

fn json_file(path: &Path) -> Result<Value, String> {
    let size = fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size > MAX_JSON {
        return Err(format!("it has {size} bytes, more than {MAX_JSON}"));
    }
    let text = fs::read(path).map_err(|e| e.to_string())?;
    serde_json::from_slice(&text).map_err(|e| format!("not JSON: {e}"))
}

/// The highest version that the file names and that is spoken; the oldest where it names none.
fn version(file: &File) -> Result<String, String> {
    let named = file.versions.iter().chain([&file.version]);
    let named: Vec<_> = named.filter(|version| !version.is_empty()).collect();
    if named.is_empty() {
        return Ok(VERSIONS[0].to_owned());
    }
    let known = named.iter().filter_map(|version| rank(version)).max();
    known.map(|rank| VERSIONS[rank].to_owned()).ok_or_else(|| {
        let named: Vec<_> = named.iter().map(|version| version.as_str()).collect();
        format!(
            "cniVersion {} is not one of {}",
            named.join(", "),
            VERSIONS.join(", ")
        )
    })
}

fn rank(version: &str) -> Option<usize> {
    VERSIONS.iter().position(|known| *known == version)
}

/// Whether a network may have this name, which is a part of paths.
fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    name.len() <= 255
        && name.bytes().all(plain)
        && name
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(dir: &Path, text: &str) -> Result<NetworkList, String> {
        let file = dir.join("10-n.conflist");
        fs::write(&file, text).unwrap();
        read(&file)
    }

    #[test]
    fn the_highest_version_that_is_spoken_counts() {
        let dir = tempfile::tempdir().unwrap();
        let with = |versions: &str| {
            let text = format!(r#"{{{versions} "name":"n","plugins":[{{"type":"a"}}]}}"#);
            read_text(dir.path(), &text).map(|list| list.version)
        };
        assert_eq!(with("").unwrap(), "0.3.0");
        assert_eq!(with(r#""cniVersion":"1.0.0","#).unwrap(), "1.0.0");
        let several = r#""cniVersion":"0.4.0","cniVersions":["1.1.0","7.0.0"],"#;
        assert_eq!(with(several).unwrap(), "1.1.0");
        assert!(
            with(r#""cniVersion":"9.0.0","#)
                .unwrap_err()
                .contains("9.0.0")
        );
        let list = read_text(
            dir.path(),
            r#"{"cniVersion":"1.0.0","name":"n","disableCheck":true,"plugins":[{"type":"a"}]}"#,
        )
        .unwrap();
        assert!(list.speaks("0.4.0") && !list.speaks("1.1.0"));
        assert!(list.disable_check && !list.disable_gc);
    }

    #[test]
    fn plugins_in_files_of_their_own_are_appended() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("n")).unwrap();
        fs::write(dir.path().join("n/10-b.conf"), r#"{"type":"b"}"#).unwrap();
        fs::write(dir.path().join("n/ignored"), "{").unwrap();
        let types = |text: &str| {
            let list = read_text(dir.path(), text)?;
            Ok::<_, String>(
                list.plugins
                    .iter()
                    .map(|p| plugin_type(p).to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(
            types(r#"{"name":"n","plugins":[{"type":"a"}]}"#).unwrap(),
            ["a", "b"]
        );
        assert_eq!(types(r#"{"name":"n"}"#).unwrap(), ["b"]);
        let only = r#"{"name":"n","loadOnlyInlinedPlugins":true,"plugins":[{"type":"a"}]}"#;
        assert_eq!(types(only).unwrap(), ["a"]);
        assert_eq!(
            types(r#"{"name":"n","type":"single"}"#).unwrap(),
            ["single"]
        );
        fs::write(dir.path().join("n/20-c.conf"), "[]").unwrap();
        assert!(types(r#"{"name":"n"}"#).unwrap_err().contains("20-c.conf"));
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["", "..", "a/b", "../x", "-a"] {
            let text = format!(r#"{{"name":"{name}","plugins":[{{"type":"a"}}]}}"#);
            let why = read_text(dir.path(), &text).unwrap_err();
            assert!(why.contains("the name"), "{why}");
        }
    }
}
