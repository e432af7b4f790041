#![doc = include_str!("../README.md")]

mod args;
#[cfg(feature = "broker")]
mod broker;
mod commands;
mod exit;
mod output;

use std::process::ExitCode;

use clap::Parser;
use polymq::{Bus, BusBuilder, Environment, Registry, URL_VARIABLE};
use tracing_subscriber::filter::LevelFilter;

use crate::{
    args::{Args, Command, Connection},
    exit::{Exit, Failed},
    output::Output,
};

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return exit::usage(&error),
    };
    let output = Output::new(args.json);
    let filter = args.log.as_deref().or_else(|| args.command.log());
    if let Some(filter) = filter {
        start_log(filter, args.json);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return Failed::new(Exit::Failed, format!("the runtime cannot be started: {error}")).tell(&output);
        }
    };
    let result = runtime.block_on(run(args, &output));
    // Nothing that still runs in the background is waited for.
    runtime.shutdown_background();
    match result {
        Ok(exit) => exit.into(),
        Err(failed) => failed.tell(&output),
    }
}

async fn run(args: Args, output: &Output) -> Result<Exit, Failed> {
    let connection = args.connection;
    match args.command {
        Command::Backends(options) => commands::backends::run(&options, output),
        Command::Send(options) => commands::send::run(connection.builder()?, options, output).await,
        Command::Consume(options) => commands::consume::run(connection.builder()?, options, output).await,
        Command::Check(options) => commands::check::run(connection.builder()?, options, output).await,
        Command::DeadLetters(options) => commands::dead_letters::run(connection.builder()?, options, output).await,
        Command::Channels(options) => commands::channels::list(connection.builder()?, options, output).await,
        Command::Peek(options) => commands::channels::peek(connection.builder()?, options, output).await,
        Command::Purge(options) => commands::channels::purge(connection.builder()?, options, output).await,
        Command::Topology(options) => commands::topology::run(connection.builder()?, options, output).await,
        Command::Delete(options) => commands::channels::delete(connection.builder()?, options, output).await,
        #[cfg(feature = "broker")]
        Command::Broker(options) => broker::run(&connection, *options, output).await,
    }
}

impl Command {
    /// What is logged when nothing is said: a server tells what goes wrong.
    fn log(&self) -> Option<&'static str> {
        match self {
            #[cfg(feature = "broker")]
            Self::Broker(_) => Some("warn"),
            _ => None,
        }
    }
}

impl Connection {
    /// The first option that was given.
    #[cfg(feature = "broker")]
    fn given(&self) -> Option<&'static str> {
        let given = [
            (self.backend.is_some(), "--backend"),
            (self.url.is_some(), "--url"),
            (!self.set.is_empty(), "--set"),
            (self.prefix.is_some(), "--prefix"),
        ];
        given.into_iter().find_map(|(given, option)| given.then_some(option))
    }

    /// What the options say; the environment says the rest.
    fn builder(&self) -> Result<BusBuilder, Failed> {
        let mut builder = Bus::builder();
        for (key, value) in &self.set {
            builder = builder.with(key, value);
        }
        if let Some(url) = &self.url {
            builder = builder.url(url);
        }
        if let Some(prefix) = &self.prefix {
            builder = builder.prefix(prefix);
        }
        let Some(name) = &self.backend else { return Ok(builder) };
        let registry = Registry::linked();
        let backend = registry.backend(name)?;
        // The process's URL goes with --backend when it leads to that backend.
        if self.url.is_none()
            && let Some(url) = Environment::process().get(URL_VARIABLE)
            && url.split_once(':').is_some_and(|(scheme, _)| backend.schemes().contains(&scheme))
        {
            builder = builder.url(url);
        }
        Ok(builder.backend(name))
    }
}

/// What is logged; never what a library of a broker shows of messages and logins.
fn log_directives(filter: &str) -> String {
    let is_trace =
        |directive: &str| directive.trim().parse::<LevelFilter>().is_ok_and(|level| level == LevelFilter::TRACE);
    // At this level it prints every byte that it sends, the login included. Who asks for that by its name gets it.
    let quiet = if filter.split(',').any(is_trace) { "lapin=debug," } else { "" };
    // A warning for each message that comes back, with its body and headers; the send fails anyway.
    format!("{quiet}{filter},lapin::returned_messages=off")
}

fn start_log(filter: &str, json: bool) {
    let filter = tracing_subscriber::EnvFilter::builder().parse_lossy(log_directives(filter));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    if json {
        log.json().init();
    } else {
        log.init();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_are_not_logged_however_everything_is_asked_for() {
        for asked in
            ["trace", "TRACE", "5", "polymq=info, Trace", "trace,lapin::returned_messages=off", "trace,my_lapin=info"]
        {
            assert!(log_directives(asked).starts_with("lapin=debug,"), "{asked}");
        }
        let by_name = tracing_subscriber::EnvFilter::builder().parse_lossy(log_directives("trace,lapin=trace"));
        assert!(by_name.to_string().contains("lapin=trace"), "{by_name}");
        for asked in ["debug", "polymq=trace", "4"] {
            assert!(!log_directives(asked).contains("lapin=debug"), "{asked}");
        }
    }

    #[test]
    fn messages_that_come_back_are_not_logged_whatever_is_asked_for() {
        for asked in ["info", "trace", "lapin=trace", "lapin::returned_messages=warn"] {
            let filter = tracing_subscriber::EnvFilter::builder().parse_lossy(log_directives(asked)).to_string();
            assert!(filter.contains("lapin::returned_messages=off"), "{filter}");
            assert!(!filter.contains("lapin::returned_messages=warn"), "{filter}");
        }
    }
}
