//! Who a process runs as, where the spec says it by name.
//!
//! `process.user.username` holds `user[:group]` as image configurations have it (image spec, `config.User`): each part
//! a name or a number. Names are looked up in the container's own `/etc/passwd` and `/etc/group`, which the image
//! wrote: they are read with a bound, and what is malformed in them is passed over.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::engine::spec::User;

/// The most bytes that are read of a file.
const MAX_FILE: u64 = 1 << 20;
/// The most supplementary groups a process can have (NGROUPS_MAX).
const MAX_GROUPS: usize = 65_536;

/// A line of passwd(5).
struct Account {
    name: String,
    uid: u32,
    gid: u32,
}

/// The user with numbers in place of names, by the files below `root`. The primary group comes from the user's account,
/// unless one is named, and the groups that list the user as a member are added to the supplementary ones.
///
/// # Errors
/// A sentence that names the user or group that is not there.
pub(super) fn resolve(user: &User, root: &Path) -> Result<User, String> {
    if user.username.is_empty() {
        return Ok(user.clone());
    }
    let (name, group) = user
        .username
        .split_once(':')
        .unwrap_or((&user.username, ""));
    let passwd = read(&root.join("etc/passwd"));
    let number = name.parse::<u32>().ok();
    // A name of digits is a number, as with every other runtime.
    let account = passwd
        .lines()
        .filter_map(account)
        .find(|account| match number {
            Some(uid) => account.uid == uid,
            None => account.name == name,
        });
    let uid = match (number, &account) {
        (Some(uid), _) => uid,
        (None, Some(account)) => account.uid,
        (None, None) if name == "root" => 0,
        (None, None) => {
            return Err(format!(
                "there is no user {name} in the container's /etc/passwd"
            ));
        }
    };
    let groups = read(&root.join("etc/group"));
    let gid = if group.is_empty() {
        account.as_ref().map_or(0, |account| account.gid)
    } else if let Ok(gid) = group.parse() {
        gid
    } else {
        groups
            .lines()
            .find_map(|line| member_list(line).filter(|(name, ..)| *name == group))
            .map(|(_, gid, _)| gid)
            .ok_or_else(|| format!("there is no group {group} in the container's /etc/group"))?
    };
    // The primary group is among the others too: a program that drops it must not gain what it was denied by it.
    let mut all = vec![gid];
    all.extend(&user.additional_gids);
    if let Some(account) = account.as_ref().filter(|_| !user.strict_groups) {
        all.extend(groups.lines().filter_map(|line| {
            let (_, gid, members) = member_list(line)?;
            members
                .split(',')
                .any(|member| member == account.name)
                .then_some(gid)
        }));
    }
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|gid| seen.insert(*gid));
    all.truncate(MAX_GROUPS);
    Ok(User {
        uid,
        gid,
        additional_gids: all,
        username: String::new(),
        umask: user.umask,
        strict_groups: user.strict_groups,
    })
}

fn account(line: &str) -> Option<Account> {
    let fields: Vec<_> = line.split(':').collect();
    Some(Account {
        name: fields.first().filter(|name| !name.is_empty())?.to_string(),
        uid: fields.get(2)?.parse().ok()?,
        gid: fields.get(3)?.parse().ok()?,
    })
}

/// Name, number and members of a line of group(5).
fn member_list(line: &str) -> Option<(&str, u32, &str)> {
    let fields: Vec<_> = line.split(':').collect();
    let name = fields.first().filter(|name| !name.is_empty())?;
    Some((name, fields.get(2)?.parse().ok()?, fields.get(3)?.trim()))
}

/// The file's text; empty if there is none or it is not a file.
pub(super) fn read(path: &Path) -> String {
    let read = || {
        // Not blocking: an image could have a pipe there.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .ok()?;
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        std::fs::write(
            etc.join("passwd"),
            "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34::/srv:/bin/false\n",
        )
        .unwrap();
        std::fs::write(
            etc.join("group"),
            "root:x:0:\nwheel:x:10:root\nlogs:x:50:adm,web\nbad:x:notanumber:web\nwww:x:34:\n",
        )
        .unwrap();
        dir
    }

    fn resolved(username: &str, groups: &[u32]) -> Result<(u32, u32, Vec<u32>), String> {
        let user = User {
            username: username.into(),
            additional_gids: groups.to_vec(),
            ..User::default()
        };
        let dir = root();
        resolve(&user, dir.path()).map(|user| (user.uid, user.gid, user.additional_gids))
    }

    #[test]
    fn names_and_numbers_are_looked_up_in_the_containers_files() {
        assert_eq!(resolved("web", &[]).unwrap(), (33, 34, vec![34, 50]));
        assert_eq!(resolved("33", &[7]).unwrap(), (33, 34, vec![34, 7, 50]));
        assert_eq!(resolved("web:logs", &[]).unwrap(), (33, 50, vec![50]));
        assert_eq!(resolved("web:7", &[]).unwrap(), (33, 7, vec![7, 50]));
        assert_eq!(resolved("0", &[]).unwrap(), (0, 0, vec![0, 10]));
        assert_eq!(resolved("4242", &[]).unwrap(), (4242, 0, vec![0]));
        assert!(resolved("nobody", &[]).unwrap_err().contains("nobody"));
        assert!(resolved("web:none", &[]).unwrap_err().contains("none"));
    }

    #[test]
    fn a_strict_policy_leaves_out_the_groups_of_the_image() {
        let user = User {
            username: "web".into(),
            additional_gids: vec![7],
            strict_groups: true,
            ..User::default()
        };
        let resolved = resolve(&user, root().path()).unwrap();
        assert_eq!((resolved.gid, resolved.additional_gids), (34, vec![34, 7]));
    }

    #[test]
    fn an_image_without_files_has_root_and_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let of = |username: &str| {
            let user = User {
                username: username.into(),
                ..User::default()
            };
            resolve(&user, dir.path()).map(|user| (user.uid, user.gid))
        };
        assert_eq!(of("root").unwrap(), (0, 0));
        assert_eq!(of("1:2").unwrap(), (1, 2));
        assert!(of("web").is_err());
    }

    #[test]
    fn a_pipe_in_the_place_of_a_file_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        nix::unistd::mkfifo(&etc.join("passwd"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read(&etc.join("passwd")), "");
    }
}
