//! How the command ends: a code for scripts, one sentence for people.

use std::{io::Write, process::ExitCode};

use polymq::{Error, ErrorKind};
use serde_json::json;

use crate::output::Output;

/// The exit codes, as `--help` documents them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    Configuration = 3,
    Connection = 4,
    NotAllowed = 5,
    NoMessage = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    pub(crate) fn of(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::Config | ErrorKind::UnknownBackend | ErrorKind::NotCompiledIn => Self::Configuration,
            ErrorKind::InvalidInput => Self::Usage,
            ErrorKind::Disconnected => Self::Connection,
            // Nobody refused the connection; nobody took it either.
            ErrorKind::Timeout if error.operation() == Some("connect") => Self::Connection,
            ErrorKind::Unauthenticated | ErrorKind::PermissionDenied => Self::NotAllowed,
            ErrorKind::NotFound => Self::NoMessage,
            _ => Self::Failed,
        }
    }
}

/// Why the command failed.
#[derive(Debug)]
pub(crate) struct Failed {
    exit: Exit,
    sentence: String,
    /// Nobody reads stdout any more: that is an end, not a failure.
    quiet: bool,
}

impl Failed {
    pub(crate) fn new(exit: Exit, sentence: impl Into<String>) -> Self {
        Self { exit, sentence: sentence.into(), quiet: false }
    }

    /// Writes one line to stderr.
    pub(crate) fn tell(&self, output: &Output) -> ExitCode {
        if self.quiet {
            return Exit::Done.into();
        }
        let sentence = one_line(&self.sentence);
        let line = if output.is_json() {
            json!({ "error": sentence, "exit": self.exit as u8 }).to_string()
        } else {
            format!("error: {sentence}")
        };
        // A closed stderr leaves only the exit code to tell.
        let _ = writeln!(std::io::stderr(), "{line}");
        self.exit.into()
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::new(Exit::of(&error), error.to_string())
    }
}

impl From<std::io::Error> for Failed {
    /// An error of stdin or stdout.
    fn from(error: std::io::Error) -> Self {
        let quiet = error.kind() == std::io::ErrorKind::BrokenPipe;
        Self { quiet, ..Self::new(Exit::Failed, error.to_string()) }
    }
}

/// Help and version as they are; a wrong command line as one sentence.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    match error.kind() {
        DisplayHelp | DisplayVersion => {
            // A closed stdout is no failure of a help text.
            let _ = error.print();
            return Exit::Done.into();
        }
        DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            return Exit::Usage.into();
        }
        _ => {}
    }
    let text = error.render().to_string();
    let said = text.split("\nUsage:").next().unwrap_or(&text);
    let said = said.split("\nFor more information").next().unwrap_or(said);
    let said = said.trim_start_matches("error: ");
    let parts: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    // What was not understood has no options; this one is for those who read errors by program.
    let output = Output::new(std::env::args_os().any(|argument| argument == "--json"));
    Failed::new(Exit::Usage, format!("{}; see polymq --help", parts.join(" "))).tell(&output)
}

pub(crate) fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}
