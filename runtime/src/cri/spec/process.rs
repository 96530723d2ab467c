//! The `process` of a spec: what runs, as whom, with what environment.

use caisson_proto::cri;
use serde_json::{Value, json};

use super::super::CriError;
use super::{Input, capabilities};

/// What an image says of the process that it is made for (image spec, `config`).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ImageDefaults {
    /// "user", "uid", "user:group", "uid:gid"; empty: root.
    pub user: String,
    /// KEY=value.
    pub env: Vec<String>,
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// The remaining arguments, or the whole command.
    pub cmd: Vec<String>,
    /// The working directory; empty: /.
    pub working_dir: String,
    /// The signal that asks the process to stop; empty: SIGTERM.
    pub stop_signal: String,
}

/// Where programs are looked for when neither image nor configuration say.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The most arguments or variables, and the most bytes of all of them together.
const MAX_WORDS: usize = 65_536;
const MAX_WORD_BYTES: usize = 2 << 20;

/// `process` of a container.
///
/// # Errors
/// INVALID_ARGUMENT that names the field.
pub fn container_process(
    input: &Input<'_>,
    security: &cri::LinuxContainerSecurityContext,
) -> Result<Value, CriError> {
    let config = input.config;
    let mut process = json!({
        "terminal": config.tty,
        "user": user(security, &input.image.user)?,
        "args": args(config, input.image)?,
        "env": env(config, input.image, input.hostname)?,
        "cwd": cwd(&config.working_dir, &input.image.working_dir)?,
        "capabilities": capabilities::capabilities(security)?,
        "noNewPrivileges": security.no_new_privs,
    });
    let oom_score_adj = config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref())
        .map_or(0, |resources| resources.oom_score_adj);
    if !(-1000..=1000).contains(&oom_score_adj) {
        return Err(CriError::invalid(format!(
            "oom_score_adj is {oom_score_adj} and must be -1000 to 1000"
        )));
    }
    process["oomScoreAdj"] = oom_score_adj.into();
    Ok(process)
}

/// `process` of a further process in a container: the container's own, with another command.
///
/// # Errors
/// INVALID_ARGUMENT for an empty or over-long command.
pub fn exec_process(
    container: &Value,
    command: &[String],
    tty: bool,
    extra_env: &[String],
    working_dir: &str,
    run_as: &str,
) -> Result<Value, CriError> {
    if command.first().is_none_or(String::is_empty) {
        return Err(CriError::invalid("the command to run is empty"));
    }
    bounded("command", command)?;
    bounded("environment", extra_env)?;
    let mut process = container.clone();
    process["args"] = json!(command);
    process["terminal"] = tty.into();
    if !extra_env.is_empty() || tty {
        let mut env: Vec<String> = container["env"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|v| v.as_str().map(str::to_owned))
            .collect();
        if tty {
            set_default(&mut env, "TERM=xterm");
        }
        for variable in extra_env {
            if !variable.contains('=') || variable.starts_with('=') {
                return Err(CriError::invalid(format!(
                    "the environment variable {variable:?} is not KEY=value"
                )));
            }
            set(&mut env, variable.clone());
        }
        process["env"] = json!(env);
    }
    if !working_dir.is_empty() {
        process["cwd"] = cwd(working_dir, "")?.into();
    }
    if !run_as.is_empty() {
        process["user"] = user_value(run_as, &[])?;
    }
    Ok(process)
}

/// `process.user`. Names, primary and supplementary groups are in the image's files, which the agent sees and the
/// host does not: `username` carries "user[:group]" to it, each part a name or a number.
fn user(security: &cri::LinuxContainerSecurityContext, image: &str) -> Result<Value, CriError> {
    let mut text = if let Some(uid) = &security.run_as_user {
        id("run_as_user", uid.value)?.to_string()
    } else {
        security.run_as_username.clone()
    };
    if let Some(gid) = &security.run_as_group {
        if text.is_empty() {
            return Err(CriError::invalid(
                "run_as_group needs run_as_user or run_as_username beside it",
            ));
        }
        text = format!("{text}:{}", id("run_as_group", gid.value)?);
    }
    if text.is_empty() {
        text = image.to_owned();
    }
    let groups = security
        .supplemental_groups
        .iter()
        .map(|gid| id("supplemental_groups", *gid))
        .collect::<Result<Vec<_>, _>>()?;
    let mut user = user_value(if text.is_empty() { "0" } else { &text }, &groups)?;
    if security.supplemental_groups_policy() == cri::SupplementalGroupsPolicy::Strict {
        user["caissonStrictGroups"] = true.into();
    }
    Ok(user)
}

fn user_value(text: &str, groups: &[u32]) -> Result<Value, CriError> {
    let (name, group) = text.split_once(':').unwrap_or((text, ""));
    if name.is_empty() || text.len() > 256 || text.chars().any(char::is_control) {
        return Err(CriError::invalid(format!(
            "the user {text:?} is not user, uid, user:group or uid:gid"
        )));
    }
    Ok(json!({
        "uid": name.parse::<u32>().unwrap_or(0),
        "gid": group.parse::<u32>().unwrap_or(0),
        "additionalGids": groups,
        "username": text,
    }))
}

fn id(field: &str, value: i64) -> Result<u32, CriError> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| CriError::invalid(format!("{field} {value} is not a user or group ID")))
}

/// What runs: a command replaces the image's entry point and its arguments, arguments alone replace the image's.
fn args(config: &cri::ContainerConfig, image: &ImageDefaults) -> Result<Vec<String>, CriError> {
    let mut words = config.command.clone();
    if words.is_empty() {
        words.clone_from(&image.entrypoint);
        if config.args.is_empty() {
            words.extend(image.cmd.iter().cloned());
        }
    }
    words.extend(config.args.iter().cloned());
    if words.first().is_none_or(String::is_empty) {
        return Err(CriError::invalid(
            "no command is given, and the image has neither an entry point nor a command",
        ));
    }
    bounded("command", &words)?;
    Ok(words)
}

fn env(
    config: &cri::ContainerConfig,
    image: &ImageDefaults,
    hostname: &str,
) -> Result<Vec<String>, CriError> {
    let mut env = vec![DEFAULT_PATH.to_owned()];
    if config.tty {
        env.push("TERM=xterm".into());
    }
    if !hostname.is_empty() {
        env.push(format!("HOSTNAME={hostname}"));
    }
    for variable in &image.env {
        // An image may hold a bare name; it stands for an empty value.
        set(
            &mut env,
            if variable.contains('=') {
                variable.clone()
            } else {
                format!("{variable}=")
            },
        );
    }
    for variable in &config.envs {
        if variable.key.is_empty() || variable.key.contains('=') {
            return Err(CriError::invalid(format!(
                "the environment variable name {:?} is empty or contains =",
                variable.key
            )));
        }
        let value = std::str::from_utf8(&variable.value).map_err(|_| {
            CriError::invalid(format!(
                "the value of the environment variable {} is not UTF-8",
                variable.key
            ))
        })?;
        set(&mut env, format!("{}={value}", variable.key));
    }
    bounded("environment", &env)?;
    Ok(env)
}

/// Sets a variable, in place of one with the same name.
fn set(env: &mut Vec<String>, variable: String) {
    let name = variable.split('=').next().unwrap_or_default();
    match env
        .iter_mut()
        .find(|old| old.split('=').next() == Some(name))
    {
        Some(old) => *old = variable,
        None => env.push(variable),
    }
}

fn set_default(env: &mut Vec<String>, variable: &str) {
    let name = variable.split('=').next();
    if !env.iter().any(|old| old.split('=').next() == name) {
        env.push(variable.to_owned());
    }
}

fn cwd(asked: &str, image: &str) -> Result<String, CriError> {
    let dir = [asked, image]
        .into_iter()
        .find(|dir| !dir.is_empty())
        .unwrap_or("/");
    if asked.is_empty() && !dir.starts_with('/') {
        return Ok(format!("/{dir}")); // images do say "app" for /app
    }
    if !dir.starts_with('/') {
        return Err(CriError::invalid(format!(
            "the working directory {dir:?} is not an absolute path"
        )));
    }
    Ok(dir.to_owned())
}

fn bounded(what: &str, words: &[String]) -> Result<(), CriError> {
    let bytes: usize = words.iter().map(|word| word.len() + 1).sum();
    if words.len() > MAX_WORDS || bytes > MAX_WORD_BYTES {
        return Err(CriError::invalid(format!(
            "the {what} has {} words and {bytes} bytes; at most {MAX_WORDS} words and {MAX_WORD_BYTES} bytes are possible",
            words.len()
        )));
    }
    if words.iter().any(|word| word.contains('\0')) {
        return Err(CriError::invalid(format!("the {what} contains a NUL byte")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{built, config, with_security};
    use super::*;

    fn image() -> ImageDefaults {
        ImageDefaults {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["serve".into()],
            ..Default::default()
        }
    }

    fn asked(command: &[&str], args: &[&str]) -> cri::ContainerConfig {
        let words = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        cri::ContainerConfig {
            command: words(command),
            args: words(args),
            ..config()
        }
    }

    #[test]
    fn command_and_args_replace_what_the_image_says() {
        let run = |command: &[&str], a: &[&str]| args(&asked(command, a), &image()).unwrap();
        assert_eq!(run(&[], &[]), ["/entry", "serve"]);
        assert_eq!(run(&[], &["x"]), ["/entry", "x"]);
        assert_eq!(run(&["sh"], &[]), ["sh"]);
        assert_eq!(run(&["sh"], &["-c", "true"]), ["sh", "-c", "true"]);
        assert!(args(&asked(&[], &[]), &ImageDefaults::default()).is_err());
    }

    #[test]
    fn the_configuration_wins_over_the_image_in_the_environment() {
        let mut config = config();
        config.envs = vec![cri::KeyValue {
            key: "A".into(),
            value: b"config".to_vec(),
        }];
        let image = ImageDefaults {
            env: vec!["A=image".into(), "PATH=/x".into(), "BARE".into()],
            ..Default::default()
        };
        let env = env(&config, &image, "web").unwrap();
        assert_eq!(env, ["PATH=/x", "HOSTNAME=web", "A=config", "BARE="]);
        config.envs[0].value = vec![0xff];
        assert!(super::env(&config, &image, "web").is_err());
    }

    #[test]
    fn users_by_number_name_and_image() {
        let security = |user: Option<i64>, group: Option<i64>| cri::LinuxContainerSecurityContext {
            run_as_user: user.map(|value| cri::Int64Value { value }),
            run_as_group: group.map(|value| cri::Int64Value { value }),
            supplemental_groups: vec![7],
            ..Default::default()
        };
        let of = |user, group, image| super::user(&security(user, group), image);
        assert_eq!(of(None, None, "").unwrap()["username"], "0");
        assert_eq!(
            of(None, None, "nobody:users").unwrap()["username"],
            "nobody:users"
        );
        let both = of(Some(1000), Some(2000), "nobody").unwrap();
        assert_eq!(both["username"], "1000:2000");
        assert_eq!((&both["uid"], &both["gid"]), (&json!(1000), &json!(2000)));
        assert_eq!(both["additionalGids"], json!([7]));
        assert_eq!(both.get("caissonStrictGroups"), None);
        let mut strict = security(Some(1000), None);
        strict.supplemental_groups_policy = cri::SupplementalGroupsPolicy::Strict.into();
        assert_eq!(
            super::user(&strict, "").unwrap()["caissonStrictGroups"],
            true
        );
        assert!(of(None, Some(1), "").is_err());
        assert!(of(Some(-1), None, "").is_err());
        assert!(of(Some(i64::from(u32::MAX)), None, "").is_err());
    }

    #[test]
    fn an_exec_takes_what_it_is_not_told() {
        let mut config = config();
        config.working_dir = "/srv".into();
        let spec = built(&config).unwrap();
        let process = exec_process(
            &spec["process"],
            &["id".into()],
            true,
            &["B=1".into()],
            "",
            "1:2",
        )
        .unwrap();
        assert_eq!(process["args"], json!(["id"]));
        assert_eq!(process["cwd"], "/srv");
        assert_eq!(process["terminal"], true);
        assert_eq!(process["user"]["username"], "1:2");
        let env = process["env"].as_array().unwrap();
        assert!(env.contains(&json!("B=1")) && env.contains(&json!("TERM=xterm")));
        assert!(exec_process(&spec["process"], &[], false, &[], "", "").is_err());
    }

    #[test]
    fn privileges_can_be_held_back() {
        let spec = built(&with_security(cri::LinuxContainerSecurityContext {
            no_new_privs: true,
            readonly_rootfs: true,
            ..Default::default()
        }))
        .unwrap();
        assert_eq!(spec["process"]["noNewPrivileges"], true);
        assert_eq!(spec["root"]["readonly"], true);
    }
}
