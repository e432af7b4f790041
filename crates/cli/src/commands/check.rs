//! `polymq check`: tries what a service needs, step by step, and names the next step where it ends.

use std::{future::Future, time::Duration, time::Instant};

use polymq::{Bus, BusBuilder, ConsumeOptions, Error, ErrorKind, Message, Result};
use serde_json::json;

use crate::{
    args::Check,
    exit::{Exit, Failed},
    output::Output,
};

const STEPS: [&str; 7] = ["configuration", "connect", "ping", "create a queue", "send", "receive", "acknowledge"];

pub(crate) async fn run(builder: BusBuilder, options: Check, output: &Output) -> Result<Exit, Failed> {
    let mut report = Report { output, limit: options.timeout, done: 0 };
    match check(builder, &mut report).await {
        Ok(()) => Ok(Exit::Done),
        Err(Ended::Error(error)) => report.ended(&error).map_err(Failed::from),
        Err(Ended::Output(error)) => Err(error.into()),
    }
}

/// A step failed, or its result could not be printed.
enum Ended {
    Error(Error),
    Output(std::io::Error),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

async fn check(builder: BusBuilder, report: &mut Report<'_>) -> Result<(), Ended> {
    report.step(async { builder.check() }).await?;
    let bus = report.step(builder.connect()).await?;
    report.step(bus.ping()).await?;
    if bus.capabilities().direct {
        // What is sent would reach a handler: there is no queue in between that could be nobody's.
        let closed = bus.close().await;
        report.reached(&bus)?;
        return closed.map_err(Ended::Error);
    }
    // A name of its own, so that nobody else's messages are touched.
    let queue = bus.queue(format!("polymq-check-{}", uuid::Uuid::from_u64_pair(std::process::id().into(), nanos())));
    let outcome = use_queue(&bus, &queue, report).await;
    let removed = remove(&bus, &queue).await;
    outcome?;
    removed?;
    let closed = bus.close().await;
    report.capabilities(&bus)?;
    closed.map_err(Ended::Error)
}

async fn use_queue(bus: &Bus, queue: &polymq::Channel, report: &mut Report<'_>) -> Result<(), Ended> {
    report.step(queue.declare(ConsumeOptions::default())).await?;
    let message = Message::new("{\"check\":true}").with_content_type("application/json").with_header("check", "polymq");
    // MQTT 3.1.1 carries nothing beside the body.
    let message = if bus.capabilities().max_headers == Some(0) { Message::new("{\"check\":true}") } else { message };
    let body = message.payload().clone();
    report.step(queue.send_message(message)).await?;
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await?;
    let delivery = report.step(subscription.next()).await?;
    if *delivery.message().payload() != body {
        return Err(Error::new(ErrorKind::Other, "another message came than was sent")
            .with_operation("receive")
            .into());
    }
    report.step(async { delivery.ack().await.map_err(Error::from) }).await?;
    subscription.close().await.map_err(Ended::Error)
}

async fn remove(bus: &Bus, queue: &polymq::Channel) -> Result<(), Ended> {
    queue.delete(None).await?;
    bus.channel(queue.address().dead_letters(None)).delete(None).await?;
    Ok(())
}

fn nanos() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

struct Report<'a> {
    output: &'a Output,
    limit: Duration,
    done: usize,
}

impl Report<'_> {
    /// Runs the next step within its time and prints that it works.
    async fn step<T>(&mut self, step: impl Future<Output = Result<T, Error>>) -> Result<T, Ended> {
        let started = Instant::now();
        let value = tokio::time::timeout(self.limit, step).await.unwrap_or_else(|_| {
            let limit = humantime::format_duration(self.limit);
            let operation = if self.done <= 2 { "connect" } else { "check" };
            Err(Error::new(ErrorKind::Timeout, format!("no answer within {limit}")).with_operation(operation))
        })?;
        let (name, ms) = (STEPS[self.done], started.elapsed().as_millis() as u64);
        self.done += 1;
        self.output
            .say(|| format!("ok      {name} ({ms} ms)"), || json!({ "check": name, "ok": true, "ms": ms }))
            .map_err(Ended::Output)?;
        Ok(value)
    }

    /// Prints the step that does not work, what to do, and what was not tried.
    fn ended(&self, error: &Error) -> std::io::Result<Exit> {
        let name = STEPS.get(self.done).copied().unwrap_or("clean up");
        let next = next_step(error);
        let sentence = crate::exit::one_line(&error.to_string());
        // The hint has a line of its own.
        let sentence = sentence.strip_suffix(next).map_or(sentence.as_str(), |rest| rest.trim_end_matches("; "));
        self.output.say(
            || format!("FAILED  {name}: {sentence}\n        next: {next}"),
            || json!({ "check": name, "ok": false, "error": sentence, "next": next }),
        )?;
        for name in STEPS.iter().skip(self.done + 1) {
            self.output.say(|| format!("-       {name}: not tried"), || json!({ "check": name, "ok": null }))?;
        }
        Ok(Exit::of(error))
    }

    /// Where there is no broker.
    fn reached(&self, bus: &Bus) -> Result<(), Ended> {
        let name = bus.backend();
        self.output
            .say(
                || format!("\n{name} reaches its server; it is sent nothing, as it would handle it"),
                || json!({ "backend": name, "ok": true }),
            )
            .map_err(Ended::Output)
    }

    fn capabilities(&self, bus: &Bus) -> Result<(), Ended> {
        let persistent = bus.capabilities().persistent;
        let sentence =
            if persistent { "survive a restart of the broker" } else { "do not survive a restart of the broker" };
        self.output
            .say(
                || format!("\n{} works; accepted messages {sentence}", bus.backend()),
                || json!({ "backend": bus.backend(), "ok": true, "persistent": persistent }),
            )
            .map_err(Ended::Output)
    }
}

/// What to do next; an error's own hint says it better where it has one.
fn next_step(error: &Error) -> &str {
    match error.kind() {
        _ if error.hint().is_some() => error.hint().unwrap_or_default(),
        ErrorKind::Config => "correct the setting; polymq backends NAME lists them all",
        ErrorKind::UnknownBackend | ErrorKind::NotCompiledIn => "choose one that polymq backends lists",
        ErrorKind::Disconnected | ErrorKind::Timeout => {
            "start the broker, or correct its address in --url or POLYMQ_URL"
        }
        ErrorKind::Unauthenticated => "correct user and password",
        ErrorKind::PermissionDenied => "give the user the right to create, write and read queues",
        ErrorKind::Unsupported => "choose another backend; polymq backends shows what each can do",
        _ => "run it again with --log debug and look at the broker's own log",
    }
}
