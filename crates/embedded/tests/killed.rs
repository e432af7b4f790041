//! A service that is its own broker is killed with SIGKILL at any moment: what was answered is there, and what was
//! acknowledged long before does not come again. Meanwhile no other process gets its folder. What a runner's handlers had begun
//! comes again, with its count of attempts. One that closes its bus and ends has acknowledged everything.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Trial};
use polymq_core::{
    Attempt, Backoff, Bus, ConsumeOptions, ConsumerFactory, ConsumerRunner, Delivery, ErrorKind, Failure,
    FailurePolicy, Message, State, Subscription,
};
use polymq_embedded as _;
use polymq_testkit::eventually;

const FOLDER: &str = "POLYMQ_TEST_FOLDER";
/// Set for a service that ends by itself.
const ENDS: &str = "POLYMQ_TEST_ENDS";
/// Set for a service with a runner.
const RUNS: &str = "POLYMQ_TEST_RUNS";
/// Set for a member of a topic's group, which handles a half and keeps what comes then.
const MEMBER: &str = "POLYMQ_TEST_MEMBER";
/// How many messages it adds to those whose handlers never end.
const HELD: usize = 4;
const ROUNDS: usize = 3;
const MESSAGES: usize = 64;
/// When closing gives up what is not answered.
const CLOSING: Duration = Duration::from_secs(5);
/// What a service ends with whose closing took that long.
const GAVE_UP: i32 = 75;

async fn connect(folder: &Path) -> polymq_core::Result<Bus> {
    Bus::connect(&format!("embedded://{}", folder.display())).await
}

/// The service: sends numbers, takes every other one, and says what was answered.
async fn serve(folder: &Path) {
    let bus = connect(folder).await.expect("opened");
    let (sent, done) = (bus.queue("sent"), bus.queue("done"));
    let mut subscription = done.subscribe(Default::default()).await.expect("subscribed");
    for n in 0_u64.. {
        let text = format!("{:032x}", number(n));
        sent.send_message(Message::new(text.clone())).await.expect("sent");
        println!("sent {text}");
        done.send_message(Message::new(text.clone())).await.expect("sent");
        let mut taken = subscription.receive(1, Duration::from_secs(600)).await.expect("received");
        let delivery: Delivery = taken.pop().expect("one");
        let body = body_of(delivery.message());
        delivery.ack().await.expect("acknowledged");
        println!("acked {body}");
    }
}

/// The service that ends: takes what it has sent, closes, and is gone at once.
async fn end(folder: &Path) -> ! {
    let bus = connect(folder).await.expect("opened");
    let queue = bus.queue("done");
    let mut subscription = queue.subscribe(Default::default()).await.expect("subscribed");
    for _ in 0..MESSAGES {
        queue.send_message(Message::new("x")).await.expect("sent");
    }
    let mut taken = 0;
    while taken < MESSAGES {
        for delivery in subscription.receive(256, Duration::from_secs(600)).await.expect("received") {
            delivery.ack().await.expect("acknowledged");
            taken += 1;
        }
    }
    let closing = Instant::now();
    let closed = bus.close().await;
    if closing.elapsed() >= CLOSING {
        std::process::exit(GAVE_UP);
    }
    closed.expect("closed");
    std::process::exit(0);
}

/// The service with a runner, which says what its handlers have begun, with the attempt, and what was acknowledged. Those that are
/// to be held fail at first, and never end from then on.
async fn run(folder: &Path) {
    async fn handle(message: Message, attempt: Attempt, begun: State<Begun>) -> Result<(), Failure> {
        let body = body_of(&message);
        println!("begun {body} {}", attempt.0);
        match (body.starts_with("held"), attempt.0) {
            (false, _) => begun.lock().expect("never poisoned").push(body),
            (true, 1) => return Err(Failure::new("at first")),
            (true, _) => std::future::pending().await,
        }
        Ok(())
    }
    let bus = connect(folder).await.expect("opened");
    let queue = bus.queue("work");
    let begun = Begun::default();
    let policy = FailurePolicy { backoff: Backoff::fixed(Duration::ZERO), ..FailurePolicy::default() };
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(begun.clone()).route("work", handle).concurrency(HELD * ROUNDS + 1).policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("started");
    for n in 0..HELD as u64 {
        queue.send_message(Message::new(format!("held-{:032x}", number(n)))).await.expect("sent");
    }
    for n in 0_u64.. {
        let body = format!("short-{:032x}", number(n));
        queue.send_message(Message::new(body.clone())).await.expect("sent");
        eventually(Duration::from_secs(60), || async {
            // In this order: when as many were handled as have begun by now, all of these are.
            let handled = running.stats("work").expect("a subscription").handled;
            let begun = begun.lock().expect("never poisoned");
            let is_handled = begun.len() as u64 == handled && begun.contains(&body);
            if is_handled { Ok(()) } else { Err(format!("{handled} handled, {} begun", begun.len())) }
        })
        .await;
        println!("acked {body}");
    }
}

const EVENTS: u32 = 10;

async fn group(bus: &Bus) -> Subscription {
    let options = ConsumeOptions { group: Some("billing".to_owned()), ..ConsumeOptions::default() };
    bus.topic("events").subscribe(options).await.expect("subscribed")
}

/// The member: acknowledges the first half, one after the other, and holds the next one.
async fn join(folder: &Path) {
    let bus = connect(folder).await.expect("opened");
    let mut subscription = group(&bus).await;
    for number in 1..=EVENTS {
        bus.topic("events").send_message(Message::new(number.to_string())).await.expect("sent");
    }
    for _ in 0..EVENTS / 2 {
        subscription.next().await.expect("received").ack().await.expect("acknowledged");
    }
    let _held = subscription.next().await.expect("received");
    // What is answered now was written after the acknowledgements.
    bus.queue("other").send_message(Message::new("x")).await.expect("sent");
    println!("holds");
    std::future::pending().await
}

/// A service that reads a topic in a group goes on, after it was killed, behind what it has acknowledged. What it had moved to the
/// group within its last second comes once more, behind that.
fn a_member_of_a_group_that_is_killed_goes_on_where_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut child = start(folder.path(), Some(MEMBER));
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
    assert!(lines.any(|line| line == "holds"), "it ended before");
    child.kill().expect("killed");
    child.wait().expect("gone");
    let found = block_on(async {
        let bus = connect(folder.path()).await.expect("opened");
        let found = all(&mut group(&bus).await, EVENTS as usize / 2).await;
        bus.close().await.expect("close");
        found
    });
    let numbers = |first| (first..=EVENTS).map(|number| number.to_string()).collect::<Vec<_>>();
    let (left, again) = found.split_at(found.len().min(EVENTS as usize / 2));
    assert_eq!(left, numbers(EVENTS / 2 + 1));
    assert!(numbers(1).ends_with(again), "{again:?}");
}

/// The short messages that handlers have begun.
type Begun = Arc<Mutex<Vec<String>>>;

fn body_of(message: &Message) -> String {
    String::from_utf8_lossy(message.payload()).into_owned()
}

/// Different in every process and for every number.
fn number(n: u64) -> u128 {
    (u128::from(std::process::id()) << 64) | u128::from(n)
}

fn start(folder: &Path, what: Option<&str>) -> Child {
    let itself = std::env::current_exe().expect("a path");
    let what = what.map(|variable| (variable, ""));
    Command::new(itself)
        .env(FOLDER, folder)
        .envs(what)
        .stdout(Stdio::piped())
        .spawn()
        .expect("the test starts again as a service")
}

/// Takes everything that waits, which is so many: nothing more comes for a while.
async fn all(subscription: &mut Subscription, wanted: usize) -> Vec<String> {
    let mut bodies = Vec::new();
    take_all(subscription, wanted, |delivery| bodies.push(body_of(delivery.message()))).await;
    bodies
}

async fn take_all(subscription: &mut Subscription, wanted: usize, mut see: impl FnMut(&Delivery)) {
    let (mut seen, began) = (0, Instant::now());
    loop {
        let taken = subscription.receive(256, Duration::from_secs(5)).await.expect("received");
        if taken.is_empty() && (seen >= wanted || began.elapsed() > Duration::from_secs(60)) {
            return;
        }
        for delivery in taken {
            see(&delivery);
            seen += 1;
            delivery.ack().await.expect("acknowledged");
        }
    }
}

fn killed_service_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut sent, mut acked) = (Vec::new(), BTreeSet::new());
    for round in 0..ROUNDS {
        let mut child = start(folder.path(), None);
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut seen = 0;
        let mut lines = lines.map_while(Result::ok);
        for line in lines.by_ref() {
            let Some((what, body)) = line.split_once(' ') else { continue };
            match what {
                "sent" => sent.push(body.to_owned()),
                _ => drop(acked.insert(body.to_owned())),
            }
            seen += 1;
            if seen == 40 + round * 7 {
                break;
            }
        }
        let refused = block_on(async { connect(folder.path()).await.map(drop) }).expect_err("it is the service's");
        assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
        assert!(refused.to_string().contains("another process"), "{refused}");
        child.kill().expect("killed");
        child.wait().expect("gone");
        // What it said before it was killed, and we have not read yet.
        for line in lines {
            match line.split_once(' ') {
                Some(("sent", body)) => sent.push(body.to_owned()),
                Some((_, body)) => drop(acked.insert(body.to_owned())),
                None => {}
            }
        }
    }
    let (found, again) = block_on(async {
        let bus = connect(folder.path()).await.expect("opened");
        let found =
            all(&mut bus.queue("sent").subscribe(Default::default()).await.expect("subscribed"), sent.len()).await;
        let again = all(&mut bus.queue("done").subscribe(Default::default()).await.expect("subscribed"), 0).await;
        bus.close().await.expect("close");
        (found, again)
    });
    let known: BTreeSet<_> = found.iter().collect();
    let lost: Vec<_> = sent.iter().filter(|body| !known.contains(body)).collect();
    assert!(lost.is_empty(), "{} of {} were answered and are lost: {lost:?}", lost.len(), sent.len());
    assert_eq!(known.len(), found.len(), "nothing was sent twice");
    let again: Vec<_> = again.iter().filter(|body| acked.contains(*body)).collect();
    // The acknowledgements of the last moments may not have reached the disk.
    assert!(again.len() <= 4 * ROUNDS, "acknowledged and came again: {again:?}");
    println!("{} sent, 0 lost; {} acknowledged, {} of them again", sent.len(), acked.len(), again.len());
}

/// A service with a runner is killed while its handlers run, again and again: what they held comes again, each message once and as no
/// earlier an attempt than it was; what was acknowledged long before does not.
fn a_service_killed_in_its_handlers_gets_their_messages_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut held, mut acked) = (BTreeMap::<String, u32>::new(), BTreeSet::<String>::new());
    for round in 1..=ROUNDS {
        let mut child = start(folder.path(), Some(RUNS));
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (mut holds, mut short, mut since) = (BTreeSet::new(), Vec::new(), 0);
        // The pipe stays: with it the service would end in its own order.
        let mut lines = lines.map_while(Result::ok);
        for line in lines.by_ref() {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["begun", body, attempt] if body.starts_with("held") => {
                    let attempt: u32 = attempt.parse().expect("a number");
                    let before = held.insert(body.to_owned(), attempt).unwrap_or(0);
                    assert!(attempt >= before, "{body} was attempt {before} and came as {attempt}");
                    assert!(holds.insert((body.to_owned(), attempt)), "{body} came twice as attempt {attempt}");
                }
                ["begun", body, _] => assert!(!acked.contains(body), "acknowledged and came again: {body}"),
                ["acked", body] => {
                    short.push(body.to_owned());
                    // Each has waited for the disk, so what was settled well before is there too.
                    since += usize::from(holds.iter().filter(|(_, attempt)| *attempt > 1).count() == HELD * round);
                }
                _ => {}
            }
            // They are behind those that are held: when so many have passed, some of these do not come.
            if since == 20 || short.len() == 500 {
                break;
            }
        }
        assert_eq!(since, 20, "round {round}: {} acknowledged and this held: {holds:?} of {held:?}", short.len());
        child.kill().expect("killed");
        child.wait().expect("gone");
        // The acknowledgements of the last moments may not have reached the disk.
        acked.extend(short.drain(..short.len() - 4));
    }
    let found = block_on(async {
        let bus = connect(folder.path()).await.expect("opened");
        let mut subscription = bus.queue("work").subscribe(Default::default()).await.expect("subscribed");
        let mut found = Vec::new();
        take_all(&mut subscription, held.len(), |delivery| {
            found.push((body_of(delivery.message()), delivery.attempt()))
        })
        .await;
        bus.close().await.expect("close");
        found
    });
    let again: Vec<_> = found.iter().filter(|(body, _)| acked.contains(body)).collect();
    assert!(again.is_empty(), "acknowledged and came again: {again:?}");
    let mut attempts: Vec<_> = found.iter().filter(|(body, _)| body.starts_with("held")).cloned().collect();
    attempts.sort();
    assert!(attempts.iter().map(|(body, _)| body).eq(held.keys()), "{attempts:?} of {held:?}");
    assert!(attempts.iter().all(|(body, attempt)| *attempt >= held[body]), "{attempts:?} after {held:?}");
    let attempts: BTreeSet<_> = attempts.iter().map(|(_, attempt)| attempt).collect();
    println!("{} held, each again, as attempt {attempts:?}; {} acknowledged, 0 of them again", held.len(), acked.len());
}

fn a_service_that_ends_has_acknowledged() {
    let ends_in_time = |folder: &Path| {
        let itself = std::env::current_exe().expect("a path");
        let ended = Command::new(itself).env(FOLDER, folder).env(ENDS, "").status().expect("started");
        assert!(ended.success() || ended.code() == Some(GAVE_UP), "{ended}");
        ended.success()
    };
    // Where the disk stands still for longer than closing waits, nothing is promised: a new folder then.
    let in_time = (0..4).find_map(|_| {
        let folder = tempfile::tempdir().expect("a folder");
        (0..ROUNDS).all(|_| ends_in_time(folder.path())).then_some(folder)
    });
    let folder = in_time.expect("closing has not given up");
    let again = block_on(async {
        let bus = connect(folder.path()).await.expect("opened");
        all(&mut bus.queue("done").subscribe(Default::default()).await.expect("subscribed"), 0).await
    });
    assert!(again.is_empty(), "{} of {} were acknowledged and came again", again.len(), ROUNDS * MESSAGES);
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(work)
}

fn main() -> ExitCode {
    if let Ok(folder) = std::env::var(FOLDER) {
        if std::env::var_os(ENDS).is_some() {
            block_on(end(Path::new(&folder)));
        }
        if std::env::var_os(RUNS).is_some() {
            block_on(run(Path::new(&folder)));
        }
        if std::env::var_os(MEMBER).is_some() {
            block_on(join(Path::new(&folder)));
        }
        block_on(serve(Path::new(&folder)));
        return ExitCode::SUCCESS;
    }
    let tests: [(&str, fn()); 4] = [
        ("killed_service_loses_nothing", killed_service_loses_nothing),
        (
            "a_service_killed_in_its_handlers_gets_their_messages_again",
            a_service_killed_in_its_handlers_gets_their_messages_again,
        ),
        ("a_service_that_ends_has_acknowledged", a_service_that_ends_has_acknowledged),
        (
            "a_member_of_a_group_that_is_killed_goes_on_where_it_was",
            a_member_of_a_group_that_is_killed_goes_on_where_it_was,
        ),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit_code()
}
