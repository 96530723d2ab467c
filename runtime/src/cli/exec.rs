//! `caisson exec`: one more process in a running container.

use std::process::ExitCode;

use caisson_proto::{cli, cri};
use clap::Args;

use super::client::{CliError, Client};
use super::session::{self, Session};
use super::{options, terminal};

/// The arguments of `caisson exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Give the command a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Pass standard input on.
    #[arg(short, long)]
    interactive: bool,
    /// Set a variable of the environment.
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = options::environment)]
    env: Vec<cri::KeyValue>,
    /// The working directory in the container.
    #[arg(short, long, default_value = "")]
    workdir: String,
    /// The user, as a name or number, with a group's behind a colon.
    #[arg(short, long, default_value = "")]
    user: String,
    /// The container's name or ID.
    container: String,
    /// The command and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

/// Runs the command and passes its exit status through.
pub async fn exec(client: &Client, args: ExecArgs) -> Result<ExitCode, CliError> {
    if args.tty && args.interactive && !terminal::is_terminal() {
        return Err(CliError::Usage(
            "standard input is not a terminal; leave out -t".into(),
        ));
    }
    let container = client.find(&args.container).await?;
    let env = args
        .env
        .iter()
        .map(|kv| format!("{}={}", kv.key, String::from_utf8_lossy(&kv.value)))
        .collect();
    let start = cli::StreamStart {
        container_id: container.id,
        command: args.command,
        stdin: args.interactive,
        tty: args.tty,
        env,
        working_dir: args.workdir,
        user: args.user,
        size: None,
        start_container: false,
    };
    session::exec(client, Session { start, stop: None }).await
}
