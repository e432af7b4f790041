//! The program: handlers that are written once and know no backend. Its environment decides where it runs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use polymq::{
    Answer, Attempt, Backoff, ConsumeOptions, Error, RetryMode, RouteStats, Running, Subscription, dead_letter,
    prelude::*,
};
use polymq_testkit::{closes, try_eventually};

use super::step::{Scenario, Sent, Step, millis};

/// How long anything may take that must happen.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long nothing more may happen.
const QUIET: Duration = Duration::from_millis(700);
/// Between attempts; brokers that know whole seconds wait longer.
const BACKOFF: Duration = Duration::from_millis(300);

/// Stands for any correlation id.
const REQUEST: &str = "of the request";

/// What came of a step, line by line, and what the backend declares.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Played {
    pub(crate) declared: BTreeMap<String, String>,
    pub(crate) steps: BTreeMap<String, Vec<String>>,
}

/// Plays every step, one after the other.
pub(crate) async fn play(scenario: &Scenario) -> Result<Played> {
    let bus = Bus::from_env().await?;
    let mut played = Played { declared: bus.capabilities().table().into_iter().collect(), ..Played::default() };
    for step in &scenario.step {
        let mut lines = if step.is_topic() { topic(step).await? } else { queue_in_time(step).await? };
        lines.sort();
        played.steps.insert(step.name.clone(), lines);
    }
    closes(&bus).await;
    Ok(played)
}

/// A step on a queue. What a broker was not told in time comes again to the service that goes on, which says nothing about the
/// backend: then the step is played anew, on a queue of its own.
async fn queue_in_time(step: &Step) -> Result<Vec<String>> {
    let mut again = step.clone();
    for round in 1..5 {
        if let Some(lines) = queue(&again).await? {
            return Ok(lines);
        }
        again.name = format!("{}-{round}", step.name);
    }
    Err(Failure::new(format!("{}: the broker is never told in time what was handled", step.name)))
}

#[derive(Debug, Clone, Serialize, Deserialize, Message)]
#[message(kind = "order")]
struct Order {
    id: String,
    /// What each attempt does; the last one repeats.
    does: Vec<String>,
    takes_ms: u64,
}

impl Order {
    async fn handle(&self, attempt: u32, story: &Story) -> Result<()> {
        let last = self.does.len().saturating_sub(1);
        let what = self.does.get(last.min(attempt as usize - 1)).map_or("ok", String::as_str);
        story.tell(&self.id, attempt, what);
        match what {
            "ok" => {
                tokio::time::sleep(millis(self.takes_ms)).await;
                Ok(())
            }
            "fail" => Err(Failure::new(format!("attempt {attempt} failed"))),
            "permanent" => Err(Failure::permanent("no such customer")),
            "panic" => panic!("as the scenario wants"),
            "hang" => std::future::pending().await,
            other => panic!("the scenario wants {other:?}, which nobody can do"),
        }
    }
}

async fn handle(order: Order, attempt: Attempt, story: State<Story>) -> Result<()> {
    order.handle(attempt.0, &story).await
}

async fn answer(order: Order, attempt: Attempt, story: State<Story>) -> Result<Answer<String>> {
    order.handle(attempt.0, &story).await?;
    Ok(Answer(format!("answer to {}", order.id)))
}

async fn handle_batch(batch: Batch<Context>, story: Story) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for context in batch.iter() {
        let order: Order = serde_json::from_slice(context.message().payload()).expect("an order");
        outcomes.push(match order.handle(context.attempt(), &story).await {
            Ok(()) => Outcome::Ack,
            Err(failure) if failure.retry() == polymq::Retry::Never => Outcome::reject(failure.to_string()),
            Err(failure) => Outcome::retry(failure.to_string()),
        });
    }
    outcomes
}

/// What handlers were called with.
#[derive(Debug, Clone, Default)]
struct Story(Arc<Mutex<Told>>);

#[derive(Debug, Default)]
struct Told {
    calls: Vec<Call>,
    /// Messages of which nothing more can come.
    settled: usize,
}

#[derive(Debug, Clone)]
struct Call {
    id: String,
    attempt: u32,
    what: String,
    at: Instant,
}

impl Story {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, id: &str, attempt: u32, what: &str) {
        let call = Call { id: id.to_owned(), attempt, what: what.to_owned(), at: Instant::now() };
        self.told().calls.push(call);
    }

    async fn reaches(&self, what: &str, count: usize, now: impl Fn(&Told) -> usize) -> Result<(), String> {
        try_eventually(PATIENCE, || async {
            let seen = now(&self.told());
            if seen >= count { Ok(()) } else { Err(format!("{seen} of {count} {what}: {:?}", self.told())) }
        })
        .await
    }
}

/// The handlers of a step on a queue.
fn consumers(step: &Step, bus: &Bus, story: &Story) -> ConsumerFactory {
    let mut consumers = ConsumerFactory::new(bus);
    let settled = story.clone();
    consumers.state(story.clone()).on_handled(move |event| {
        if matches!(event.outcome, "acked" | "dead-lettered" | "dropped") {
            settled.told().settled += 1;
        }
    });
    let of_batch = story.clone();
    let route = match step.batch {
        Some(max) => consumers.route_batch(step.channel(), max, move |batch| handle_batch(batch, of_batch.clone())),
        None if step.requests => consumers.route(step.channel(), answer),
        None => consumers.route(step.channel(), handle),
    };
    let mode = if step.in_place { RetryMode::InPlace } else { RetryMode::Redeliver };
    let (max_attempts, backoff) = (step.max_attempts, Backoff::fixed(BACKOFF));
    route
        .policy(FailurePolicy { max_attempts, backoff, mode, ..FailurePolicy::default() })
        .concurrency(step.concurrency);
    if step.ordered_by_key {
        route.ordered_by_key();
    }
    if let Some(limit) = step.timeout_ms {
        route.timeout(millis(limit));
    }
    consumers
}

/// A message of the scenario, and when it may be delivered.
fn message(step: &Step, bus: &Bus, sent: &Sent) -> Result<(polymq::Message, Instant)> {
    let order = Order { id: sent.id.clone(), does: sent.does.clone(), takes_ms: step.takes_ms };
    let mut message = match &sent.body {
        None => bus.queue(step.channel()).message(&order)?,
        Some(body) => {
            let message = polymq::Message::new(body.clone()).with_kind("order");
            match &sent.content_type {
                Some(content_type) => message.with_content_type(content_type.clone()),
                None => message,
            }
        }
    };
    message = message.with_id(sent.id.as_str()).with_header("tenant", "acme é").with_correlation_id("saga-7");
    if let Some(kind) = &sent.kind {
        message = message.with_kind(kind.clone());
    }
    if let Some(key) = &sent.key {
        message = message.with_key(key.clone());
    }
    if let Some(ttl) = sent.ttl_ms {
        message = message.expires_in(millis(ttl));
    }
    let mut due = Instant::now();
    if let Some(delay) = sent.delay_ms {
        message = message.deliver_in(millis(delay));
        due += millis(delay);
    }
    Ok((message, due))
}

/// A step on a queue: sends, handles, stops, and tells what came of it; nothing when its broker was not told in time what the
/// first service had handled.
async fn queue(step: &Step) -> Result<Option<Vec<String>>> {
    let mut bus = Bus::from_env().await?;
    let declared = bus.capabilities().table().into_iter().collect();
    let expected = step.expected(&declared).0;
    let story = Story::default();
    if let Err(error) = consumers(step, &bus, &story).check() {
        return Ok(Some(vec![format!("refused: {:?}", error.kind())]));
    }
    let mut running = None;
    if step.sent_before_start_ms.is_none() {
        running = Some(start(step, &bus, &story).await?);
    }
    let (mut lines, mut sent, mut due) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    let channel = bus.queue(step.channel()).with_timeout(PATIENCE);
    if step.sent_before_start_ms.is_some() {
        // A message's time runs from when it is made, and making a queue takes its time.
        channel.declare(ConsumeOptions::default()).await?;
    }
    let mut messages = Vec::new();
    for one in step.all() {
        let (message, at) = message(step, &bus, &one)?;
        due.insert(one.id.clone(), at);
        sent.insert(one.id, message.clone());
        messages.push(message);
    }
    if step.requests {
        // Each request has a correlation id of its own, which nobody knows before.
        sent.values_mut().for_each(|message| *message = message.clone().with_correlation_id(REQUEST));
    }
    let ids: Vec<_> = step.all().into_iter().map(|one| one.id).collect();
    let mut accepted = ids.len();
    if step.requests {
        for (id, message) in ids.iter().zip(messages) {
            lines.push(match channel.request_message(message).await {
                Ok(reply) => format!("{id}: {}", reply.decode::<String>()?),
                Err(error) => format!("{id}: {:?}: {}", error.kind(), error.message()),
            });
        }
    } else {
        for (id, result) in ids.iter().zip(channel.send_all(messages).await) {
            if let Err(error) = result {
                lines.push(format!("{id}: not sent: {:?}", error.kind()));
                accepted -= 1;
            }
        }
    }
    if let Some(wait) = step.sent_before_start_ms {
        tokio::time::sleep(millis(wait)).await;
        // What has expired may be gone, unless the service is who sees to it; everything else is waited for.
        let ours = expected.iter().any(|line| line.contains("expired "));
        accepted = step.all().iter().filter(|one| ours || one.ttl_ms.is_none_or(|ttl| ttl > wait)).count();
    }
    let mut running = match running {
        Some(running) => running,
        None => start(step, &bus, &story).await?,
    };
    let mut counters = RouteStats::default();
    if let Some(calls) = step.stop_after {
        story.reaches("calls", calls, |told| told.calls.len()).await.map_err(Failure::new)?;
        running.stop().await?;
        add(&mut counters, running.stats(&step.channel())?);
        if !closes(&bus).await {
            return Ok(None);
        }
        bus = Bus::from_env().await?;
        running = start(step, &bus, &story).await?;
    }
    if let Err(late) = story.reaches("settled", accepted, |told| told.settled).await {
        lines.push(late);
    }
    // What comes twice comes now.
    tokio::time::sleep(QUIET).await;
    running.stop().await?;
    add(&mut counters, running.stats(&step.channel())?);
    lines.extend(called(step, &story, &due));
    let letters = expected.iter().filter(|line| line.starts_with("dead ")).count() as u64;
    lines.extend(buried(step, &bus, &sent, counters.dead_lettered.max(letters)).await?);
    lines.push(counted(&counters));
    closes(&bus).await;
    Ok(Some(lines))
}

async fn start(step: &Step, bus: &Bus, story: &Story) -> Result<Running, Error> {
    ConsumerRunner::new(consumers(step, bus, story)).drain_timeout(PATIENCE).start().await
}

/// One line for each message that reached a handler; with order by key, one for each key.
fn called(step: &Step, story: &Story, due: &BTreeMap<String, Instant>) -> Vec<String> {
    let calls = story.told().calls.clone();
    let mut lines = BTreeMap::<String, String>::new();
    let mut last = BTreeMap::<String, Call>::new();
    for call in calls {
        let subject = match step.all().iter().find(|one| one.id == call.id).and_then(|one| one.key.clone()) {
            Some(key) if step.ordered_by_key => format!("key {key}"),
            _ => call.id.clone(),
        };
        let line = lines.entry(subject.clone()).or_insert_with(|| format!("{subject}:"));
        let name = if step.ordered_by_key { format!("{} ", call.id) } else { String::new() };
        *line +=
            &if step.attempts { format!(" {name}{}@{}", call.what, call.attempt) } else { format!(" {}", call.what) };
        // Brokers' clocks tell milliseconds.
        let slack = Duration::from_millis(5);
        let earliest = match last.get(&call.id) {
            Some(before) if before.what != "ok" => before.at + BACKOFF,
            _ => due[&call.id],
        };
        if call.at + slack < earliest {
            *line += " EARLY";
        }
        last.insert(call.id.clone(), call);
    }
    lines.into_values().collect()
}

/// One line for each dead letter, with its story.
async fn buried(step: &Step, bus: &Bus, sent: &BTreeMap<String, polymq::Message>, count: u64) -> Result<Vec<String>> {
    let letters = bus.queue(format!("{}.dlq", step.channel()));
    let mut subscription = letters.subscribe(ConsumeOptions::default()).await?;
    let mut lines = Vec::new();
    for _ in 0..count {
        lines.extend(take(&mut subscription, sent, PATIENCE).await?);
    }
    // One too many is one too many.
    lines.extend(take(&mut subscription, sent, QUIET).await?);
    subscription.close().await?;
    Ok(lines)
}

async fn take(
    subscription: &mut Subscription,
    sent: &BTreeMap<String, polymq::Message>,
    wait: Duration,
) -> Result<Option<String>> {
    let Some(letter) = subscription.receive(1, wait).await?.pop() else { return Ok(None) };
    let message = letter.message();
    let id = message.id().map(ToString::to_string).unwrap_or_default();
    let same = sent.get(&id).is_some_and(|sent| {
        (sent.payload(), sent.headers(), sent.kind(), sent.key())
            == (message.payload(), message.headers(), message.kind(), message.key())
            && sent.content_type() == message.content_type()
            && (sent.correlation_id() == Some(REQUEST) || sent.correlation_id() == message.correlation_id())
    });
    let known = message.system_headers();
    let told = |header: &str| known.get(header).unwrap_or("-").to_owned();
    let line = format!(
        "dead {id}: {}; {} attempts; {}; first: {}; last: {}; from {}",
        if same { "the same message".to_owned() } else { format!("ANOTHER MESSAGE {message:?}") },
        told(dead_letter::ATTEMPTS),
        // Then follows what the serializer says of the body, which is no backend's affair.
        told(dead_letter::REASON)
            .split("undecodable: ")
            .next()
            .filter(|reason| !reason.is_empty())
            .unwrap_or("undecodable"),
        told(dead_letter::FIRST_ERROR),
        told(dead_letter::LAST_ERROR),
        told(dead_letter::SOURCE),
    );
    letter.ack().await?;
    Ok(Some(line))
}

fn add(sum: &mut RouteStats, more: RouteStats) {
    sum.handled += more.handled;
    sum.failed += more.failed;
    sum.retried += more.retried;
    sum.dead_lettered += more.dead_lettered;
    sum.dropped += more.dropped;
    sum.undecodable += more.undecodable;
    sum.untrusted += more.untrusted;
    sum.expired += more.expired;
    sum.unwanted += more.unwanted;
    sum.panicked += more.panicked;
    sum.timed_out += more.timed_out;
}

fn counted(counters: &RouteStats) -> String {
    let all = serde_json::to_value(counters).expect("numbers");
    let told = all.as_object().expect("fields").iter();
    let told = told.filter(|(name, value)| value.as_u64().is_some_and(|n| n > 0) && *name != "running");
    // In the order in which the struct has them, whatever the map makes of it.
    let mut told: Vec<_> = told.map(|(name, value)| format!("{name} {value}")).collect();
    let order = [
        "handled",
        "failed",
        "retried",
        "dead_lettered",
        "dropped",
        "undecodable",
        "untrusted",
        "expired",
        "unwanted",
        "panicked",
        "timed_out",
    ];
    told.sort_by_key(|text| order.iter().position(|name| text.starts_with(name)));
    format!("counters: {}", told.join(", "))
}

/// A step on a topic: one line for each group and each subscription of its own, with what it heard.
async fn topic(step: &Step) -> Result<Vec<String>> {
    let listeners = (0..step.listeners).map(|_| (String::new(), 1));
    let groups: Vec<_> = step.groups.clone().into_iter().chain(listeners).collect();
    let (mut services, mut buses, mut stories) = (Vec::new(), Vec::new(), Vec::new());
    for (group, members) in groups {
        let story = Story::default();
        for _ in 0..members {
            let bus = Bus::from_env().await?;
            let mut consumers = ConsumerFactory::new(&bus);
            let route = consumers.state(story.clone()).route(step.channel(), handle);
            if group.is_empty() {
                route.broadcast()
            } else {
                route.group(group.as_str())
            };
            if let Err(error) = consumers.check() {
                return Ok(vec![format!("refused: {:?}", error.kind())]);
            }
            services.push(ConsumerRunner::new(consumers).start().await?);
            buses.push(bus);
        }
        stories.push((group, story));
    }
    let bus = Bus::from_env().await?;
    let mut messages = Vec::new();
    for sent in step.all() {
        messages.push(message(step, &bus, &sent)?.0);
    }
    let count = messages.len();
    for result in bus.topic(step.channel()).send_all(messages).await {
        result?;
    }
    let mut lines = Vec::new();
    for (group, story) in &stories {
        if let Err(late) = story.reaches("calls", count, |told| told.calls.len()).await {
            lines.push(late);
        }
        let name = if group.is_empty() { "everyone" } else { group };
        lines.push(name.to_owned());
    }
    tokio::time::sleep(QUIET).await;
    for (line, (_, story)) in lines.iter_mut().zip(&stories) {
        let mut heard: Vec<_> = story.told().calls.iter().map(|call| call.id.clone()).collect();
        heard.sort();
        *line += &format!(": {}", heard.join(" "));
    }
    for service in services {
        service.stop().await?;
    }
    for bus in buses.into_iter().chain([bus]) {
        closes(&bus).await;
    }
    Ok(lines)
}
