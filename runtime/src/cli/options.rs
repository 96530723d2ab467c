//! Values of options as people write them.

use std::path::PathBuf;

use caisson_proto::cri;

/// Bytes as `64m`, `1.5g`, `4096`: a number and b, k, m, g or t (powers of 1024), an `i` or `b` behind it allowed.
pub fn bytes(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let unit = match unit {
        "" | "b" => 1u64,
        "k" | "kb" | "ki" | "kib" => 1 << 10,
        "m" | "mb" | "mi" | "mib" => 1 << 20,
        "g" | "gb" | "gi" | "gib" => 1 << 30,
        "t" | "tb" | "ti" | "tib" => 1 << 40,
        _ => return Err(format!("{unit:?} is not a unit; use b, k, m, g or t")),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a size; write it as 64m or 1.5g"))?;
    let bytes = number * unit as f64;
    if !(1.0..=9.0e18).contains(&bytes) {
        return Err(format!("{text:?} is not between 1 byte and 8 EiB"));
    }
    Ok(bytes as u64)
}

/// A number of CPUs as `2` or `0.5`, in thousandths.
pub fn cpus(text: &str) -> Result<u32, String> {
    let cpus: f64 = text
        .parse()
        .map_err(|_| format!("{text:?} is not a number of CPUs; write it as 2 or 0.5"))?;
    if !(0.01..=1024.0).contains(&cpus) {
        return Err(format!("{text:?} is not between 0.01 and 1024 CPUs"));
    }
    Ok((cpus * 1000.0).round() as u32)
}

/// `KEY=value`, or `KEY` for the value that this shell has.
pub fn environment(text: &str) -> Result<cri::KeyValue, String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, value.to_owned()),
        None => (
            text,
            std::env::var(text)
                .map_err(|_| format!("{text:?} has no value here; write it as {text}=value"))?,
        ),
    };
    if key.is_empty() {
        return Err(format!("{text:?} has no name before the ="));
    }
    Ok(cri::KeyValue {
        key: key.to_owned(),
        value: value.into_bytes(),
    })
}

/// `HOST:CONTAINER[:ro|rw]`.
pub fn volume(text: &str) -> Result<cri::Mount, String> {
    let parts: Vec<_> = text.split(':').collect();
    let (host, container, readonly) = match parts.as_slice() {
        [host, container] | [host, container, "rw"] => (*host, *container, false),
        [host, container, "ro"] => (*host, *container, true),
        _ => {
            return Err(format!(
                "{text:?} is not a volume; write it as /on/host:/in/container or /on/host:/in/container:ro"
            ));
        }
    };
    let host = PathBuf::from(host);
    let host = host
        .canonicalize()
        .map_err(|e| format!("{} cannot be used as a volume: {e}", host.display()))?;
    if !container.starts_with('/') {
        return Err(format!(
            "{container:?} is not an absolute path in the container"
        ));
    }
    Ok(cri::Mount {
        container_path: container.to_owned(),
        host_path: host.to_string_lossy().into_owned(),
        readonly,
        ..cri::Mount::default()
    })
}

/// A user as CRI takes it: a name, or a number and perhaps a group's.
pub fn user(text: &str) -> Result<cri::LinuxContainerSecurityContext, String> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let number = |text: &str| {
        text.parse::<u32>()
            .map(|n| cri::Int64Value { value: n.into() })
    };
    let group = group
        .map(|g| number(g).map_err(|_| format!("{g:?} is not a group's number")))
        .transpose()?;
    let mut context = cri::LinuxContainerSecurityContext {
        run_as_group: group,
        ..cri::LinuxContainerSecurityContext::default()
    };
    match number(user) {
        Ok(uid) => context.run_as_user = Some(uid),
        Err(_) if user.is_empty() => return Err(format!("{text:?} names no user")),
        Err(_) => context.run_as_username = user.to_owned(),
    }
    Ok(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(bytes("64m"), Ok(64 << 20));
        assert_eq!(bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(bytes("4096"), Ok(4096));
        for bad in ["", "m", "1x", "-1m", "1.2.3k", "99999999t", "0"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cpus_are_thousandths() {
        assert_eq!(cpus("0.5"), Ok(500));
        assert_eq!(cpus("2"), Ok(2000));
        for bad in ["", "0", "-1", "x", "nan"] {
            assert!(cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn volumes() {
        let mount = volume("/tmp:/data:ro").unwrap();
        assert_eq!(mount.container_path, "/data");
        assert!(mount.readonly);
        assert!(volume("/tmp:data").is_err());
        assert!(volume("/tmp").is_err());
        assert!(
            volume("/does/not/exist:/x")
                .unwrap_err()
                .contains("cannot be used")
        );
    }

    #[test]
    fn environment_and_users() {
        assert_eq!(environment("A=b=c").unwrap().value, b"b=c".to_vec());
        assert!(environment("=x").is_err());
        assert!(environment("CAISSON_TEST_NOT_SET").is_err());
        assert_eq!(user("5:6").unwrap().run_as_group.unwrap().value, 6);
        assert_eq!(user("www").unwrap().run_as_username, "www");
        assert!(user("www:x").is_err());
    }
}
