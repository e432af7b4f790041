//! `polymq broker`: a durable broker in this program, until it is told to stop.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use etcetera::BaseStrategy;
use polymq_broker::{Broker, BrokerError, Limits};
use serde_json::json;

use crate::{
    args::{Connection, duration},
    commands::interrupted,
    exit::{Exit, Failed},
    output::Output,
};

/// Bytes that the broker keeps in memory until they are on disk: no message can have more.
const MOST_BYTES: u64 = 128 << 20;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Options {
    /// The folder of what must survive; made when it is not there. Default: polymq/broker in the user's data folder.
    #[arg(long, value_name = "DIR", conflicts_with = "memory")]
    data_dir: Option<PathBuf>,

    /// Keeps everything in memory: it is gone with the broker.
    #[arg(long)]
    memory: bool,

    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50000", value_parser = address)]
    listen: String,

    #[command(flatten, next_help_heading = "Limits: what is beyond is refused")]
    limits: Most,
}

const AFTER_HELP: &str = "\
It prints one line when it listens. SIGINT or SIGTERM: takes no further calls, gives back what is lent, writes what
was accepted, and ends with 0; a second signal ends it at once. Logs go to stderr from level warn on; see --log.

The user's data folder is $XDG_DATA_HOME or ~/.local/share, and %APPDATA% on Windows.

Exit codes:
  0  stopped as asked
  1  failed: the data folder cannot be used, its data are damaged, or a second signal came
  2  wrong usage
  3  wrong configuration: a file that an option names cannot be used
  4  cannot listen: the address is taken or not of this machine
  5  not allowed: listening there needs a permission";

#[derive(Debug, Args)]
struct Most {
    /// Messages of one receive.
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = count)]
    max_receive: u32,

    /// Wait of a receive.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration)]
    max_wait: Duration,

    /// Time after which a message expires.
    #[arg(long, value_name = "DURATION", default_value = "12h", value_parser = duration)]
    max_expiration: Duration,

    /// Delay of a message.
    #[arg(long, value_name = "DURATION", default_value = "12h", value_parser = duration)]
    max_delay: Duration,

    /// Time for which a transaction holds a message.
    #[arg(long, value_name = "DURATION", default_value = "12h", value_parser = duration)]
    max_visibility: Duration,

    /// Deliveries of a message, also of one that asks for no limit.
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = count)]
    max_receive_count: u32,

    /// Bytes of a message; 128MiB at most.
    #[arg(long, value_name = "BYTES", default_value = "100MiB", value_parser = bytes)]
    max_message: usize,

    /// Connections at a time.
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, value_parser = count)]
    max_connections: u32,
}

impl From<Most> for Limits {
    fn from(most: Most) -> Self {
        Self {
            receive: most.max_receive as usize,
            wait: most.max_wait,
            expiration: most.max_expiration,
            delay: most.max_delay,
            visibility: most.max_visibility,
            receive_count: most.max_receive_count.cast_signed(),
            message: most.max_message,
            connections: most.max_connections as usize,
            ..Self::default()
        }
    }
}

pub(crate) async fn run(connection: &Connection, options: Options, output: &Output) -> Result<Exit, Failed> {
    if let Some(option) = connection.given() {
        let sentence = format!(
            "{option} says how to reach a broker, and this command is one: leave it out; see polymq broker --help"
        );
        return Err(Failed::new(Exit::Usage, sentence));
    }
    let folder = if options.memory { None } else { Some(folder(options.data_dir)?) };
    let mut builder = Broker::builder().listen(options.listen).limits(options.limits.into());
    if let Some(folder) = &folder {
        builder = builder.data_dir(folder);
    }
    // Before the line is printed: who reads it may send a signal at once.
    let asked = interrupted();
    let broker = builder.start().await?;
    let address = broker.address();
    // A broker whose starter has gone away goes on.
    let _ = output.say(
        || match &folder {
            Some(folder) => format!("listening on {address}, data in {}", folder.display()),
            None => format!("listening on {address}, in memory"),
        },
        || json!({ "listening": address.to_string(), "data_dir": folder }),
    );
    if !address.ip().is_loopback() {
        output.note("everybody who reaches this address can read and write");
    }
    asked.await;
    tokio::select! {
        () = broker.stop() => Ok(Exit::Done),
        () = interrupted() => Err(Failed::new(Exit::Failed, "ended at once by a second signal; what was accepted is on disk")),
    }
}

fn folder(asked: Option<PathBuf>) -> Result<PathBuf, Failed> {
    if let Some(folder) = asked {
        return Ok(folder);
    }
    let strategy = etcetera::choose_base_strategy().map_err(|_| {
        Failed::new(Exit::Usage, "this user has no home folder to keep data in: say --data-dir DIR, or --memory")
    })?;
    Ok(strategy.data_dir().join("polymq").join("broker"))
}

impl From<BrokerError> for Failed {
    fn from(error: BrokerError) -> Self {
        let exit = match &error {
            BrokerError::Listen { cause, .. } if cause.kind() == std::io::ErrorKind::PermissionDenied => {
                Exit::NotAllowed
            }
            BrokerError::Listen { .. } => Exit::Connection,
            BrokerError::Option { .. } => Exit::Configuration,
            _ => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}

fn address(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(text.to_owned()),
        _ => Err("expected HOST:PORT, such as 127.0.0.1:50000 or [::]:50000".to_owned()),
    }
}

fn count(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| (1..=i32::MAX.cast_unsigned()).contains(number));
    number.ok_or_else(|| format!("expected a number from 1 to {}", i32::MAX))
}

fn bytes(text: &str) -> Result<usize, String> {
    let size = text.parse::<bytesize::ByteSize>().ok().filter(|size| (1..=MOST_BYTES).contains(&size.as_u64()));
    size.and_then(|size| usize::try_from(size.as_u64()).ok())
        .ok_or_else(|| "expected a size of 1 to 128MiB, such as 4096, 64KiB or 100MiB".to_owned())
}
