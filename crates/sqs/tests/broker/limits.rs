//! A service that is silent, stalled or failing: what is done is bounded in time, in memory and in requests.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use polymq_core::{Bus, ConsumeOptions, ErrorKind, Message, Result, WhenFull};
use polymq_testkit::Proxy;

use crate::{
    harness::front,
    support::{Counted, address, bus, subscribe, unique, url, url_of, with},
};

/// A bus whose service falls silent after it has connected.
async fn silenced(more: &str) -> (Bus, Proxy) {
    let proxy = Proxy::start(address()).await.expect("a proxy");
    // A heartbeat would find out before the operation's own time is over.
    let bus = bus(&format!("{}&heartbeat=60s&connect_retry=true{more}", url_of(proxy.address()))).await;
    let ping = || async { bus.ping().await.map_err(|error| error.to_string()) };
    polymq_testkit::eventually(Duration::from_secs(60), ping).await;
    proxy.pause();
    (bus, proxy)
}

/// Every operation ends at its configured time.
pub async fn j21_operations_end_in_time_when_the_service_is_silent() {
    const LIMIT: Duration = Duration::from_secs(5);
    // A busy machine is not the service's silence.
    const RANGE: std::ops::Range<Duration> = LIMIT..Duration::from_secs(60);
    async fn ends<T: std::fmt::Debug>(name: &str, run: impl AsyncFnOnce(Bus) -> Result<T>) {
        let (bus, _proxy) = silenced("&connect_timeout=5s&request_timeout=5s").await;
        let began = Instant::now();
        let error = run(bus).await.expect_err(name);
        let took = began.elapsed();
        assert!(RANGE.contains(&took), "{name} took {took:?}: {error}");
        assert_eq!(error.kind(), ErrorKind::Disconnected, "{name}: {error}");
    }
    macro_rules! ends {
        ($($name:literal => $run:expr),* $(,)?) => {{ tokio::join!($(ends($name, $run)),*); }};
    }
    ends! {
        "declare" => async |bus: Bus| bus.queue("q").declare(ConsumeOptions::default()).await,
        "subscribe" => async |bus: Bus| bus.queue("q").subscribe(ConsumeOptions::default()).await.map(drop),
        "exists" => async |bus: Bus| bus.queue("q").exists(None).await,
        "delete" => async |bus: Bus| bus.queue("q").delete(None).await,
        "bind" => async |bus: Bus| bus.queue("q").bind(&bus.topic("t")).await,
        "unbind" => async |bus: Bus| bus.queue("q").unbind(&bus.topic("t")).await,
        "purge" => async |bus: Bus| bus.queue("q").purge().await,
        "list" => async |bus: Bus| bus.list().await,
        "ping" => async |bus: Bus| bus.ping().await,
        "a producer" => async |bus: Bus| bus.queue("q").send_message(Message::new("x")).await,
    }
    // Connecting.
    let proxy = Proxy::start(address()).await.expect("a proxy");
    proxy.pause();
    let began = Instant::now();
    let registry = polymq_core::Registry::linked();
    let settings = polymq_core::Settings::from_url(&format!("{}&connect_timeout=5s", url_of(proxy.address())));
    let connected = registry.backend("sqs").expect("linked").connect(&settings.expect("a URL")).await;
    assert_eq!(connected.expect_err("silence").kind(), ErrorKind::Disconnected);
    assert!(RANGE.contains(&began.elapsed()), "connecting took {:?}", began.elapsed());
    // A send whose request may have been read: the call's own time, and an honest answer.
    let proxy = Proxy::start(address()).await.expect("a proxy");
    let bus = bus(&format!("{}&heartbeat=60s", url_of(proxy.address()))).await;
    let queue = bus.queue(unique("silent")).with_timeout(LIMIT * 2);
    // Its producer is open, however long a busy machine takes for that.
    let first = || async { queue.send_message(Message::new("first")).await.map_err(|error| error.to_string()) };
    polymq_testkit::eventually(Duration::from_secs(60), first).await;
    proxy.pause();
    let began = Instant::now();
    let error = queue.send_message(Message::new("second")).await.expect_err("silence");
    assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "{error}");
    assert!((LIMIT * 2..LIMIT * 8).contains(&began.elapsed()), "sending took {:?}", began.elapsed());
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().expect("a number") * 1024
}

/// A million sends of a KiB to a service that stalls: one gigabyte, if it were kept. In a process of its own, because resident
/// memory belongs to the whole of it.
pub async fn j22_memory_is_bounded_while_the_service_stalls() {
    let output = alone(STALLED, &address().to_string()).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

async fn stays_small_while_stalled(service: SocketAddr) {
    const SENDS: usize = 1_000_000;
    const BOUND: u64 = 192 * 1024 * 1024;
    let message = || Message::new(vec![b'x'; 1024]);
    let proxy = Proxy::start(service).await.expect("a proxy");
    let bus = bus(&format!("{}&heartbeat=600s&request_timeout=600s", url_of(proxy.address()))).await;
    let queue = bus.queue(unique("stalled")).with_timeout(Duration::from_secs(600));
    let refusing = queue.with_window(1000, WhenFull::Refuse);
    for queue in [&queue, &refusing] {
        queue.send_message(message()).await.expect("sent");
    }
    proxy.pause();
    let before = resident();
    // Waiting for room, it takes from the million no more than the window.
    let taken = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let sending = tokio::spawn({
        let (queue, taken) = (queue.clone(), std::sync::Arc::clone(&taken));
        let each = move |_| {
            taken.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Message::new(vec![b'x'; 1024])
        };
        async move { queue.send_all((0..SENDS).map(each)).await.len() }
    });
    polymq_testkit::eventually(Duration::from_secs(60), || async {
        if taken.load(std::sync::atomic::Ordering::Relaxed) > 0 { Ok(()) } else { Err("nothing is taken") }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let waiting = taken.load(std::sync::atomic::Ordering::Relaxed);
    assert!((1..5_000).contains(&waiting) && !sending.is_finished(), "{waiting} messages were taken");
    // Refusing at once, all the million are asked for.
    let mut refused = 0;
    let mut kept = Vec::new();
    for _ in 0..SENDS {
        match refusing.enqueue(message()).await {
            Ok(completion) => kept.push(completion),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
                refused += 1;
            }
        }
    }
    assert_eq!((kept.len(), refused), (1000, SENDS - 1000));
    let grown = resident().saturating_sub(before);
    assert!(grown < BOUND, "{grown} bytes more are in memory, at most {BOUND} are expected");
    sending.abort();
}

/// Polls that fail are not repeated without a pause.
pub async fn j11_failing_polls_are_backed_off() {
    for (status, code) in [(400, "RequestThrottled"), (400, "SomethingStrange"), (500, "InternalError")] {
        let counted = Counted::default();
        let counter = counted.clone();
        let at = front(address(), move |request| {
            counter.add(request.action());
            (request.action() == "ReceiveMessage").then(|| request.refused(status, code, "not now"))
        });
        let bus = bus(&url_of(at)).await;
        let mut subscription = subscribe(&bus.queue(unique("failing"))).await;
        let began = Instant::now();
        assert!(subscription.receive(1, Duration::from_secs(4)).await.expect("it goes on").is_empty());
        polymq_testkit::eventually(Duration::from_secs(60), || async {
            if counted.of("ReceiveMessage") >= 2 { Ok(()) } else { Err("it has not asked again") }
        })
        .await;
        let (polls, took) = (counted.of("ReceiveMessage"), began.elapsed());
        assert!(polls as u64 <= 4 * (took.as_secs() + 1), "{code}: {polls} polls in {took:?}");
    }
}

/// Half a minute, up to three times, with three consumers of empty queues, in a process of its own.
pub async fn j11_an_idle_consumer_costs_less_than_a_hundredth_of_a_core() {
    let output = alone(IDLE, &url().replace("poll_wait=1s", "poll_wait=20s")).await;
    let text = String::from_utf8_lossy(&output.stdout);
    let percent: f64 =
        text.trim().parse().unwrap_or_else(|_| panic!("{text} {}", String::from_utf8_lossy(&output.stderr)));
    assert!(percent < 1.0, "{percent} % of a core");
}

const IDLE: &str = "POLYMQ_SQS_IDLE";
const STALLED: &str = "POLYMQ_SQS_STALLED";

/// This program as a process that nothing else runs in.
async fn alone(variable: &str, at: &str) -> std::process::Output {
    let program = std::env::current_exe().expect("this program");
    let mut command = tokio::process::Command::new(program);
    command.env(variable, at).kill_on_drop(true).output().await.expect("it runs")
}

/// Becomes such a process, if it was started as one.
pub fn run_if_alone() {
    let (idle, stalled) = (std::env::var(IDLE), std::env::var(STALLED));
    if idle.is_err() && stalled.is_err() {
        return;
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        if let Ok(service) = stalled {
            return stays_small_while_stalled(service.parse().expect("an address")).await;
        }
        let bus = bus(&idle.expect("one of both")).await;
        let topic = bus.topic(unique("idle"));
        let _two = (subscribe(&bus.queue(unique("idle"))).await, subscribe(&bus.queue(unique("idle"))).await);
        let _third = topic.subscribe(with(Some("idle"), [])).await.expect("a group");
        tokio::time::sleep(Duration::from_secs(1)).await;
        // What has to be done at the start may last on a busy machine.
        let mut least = f64::MAX;
        for _ in 0..3 {
            let (before, began) = (used(), Instant::now());
            tokio::time::sleep(Duration::from_secs(30)).await;
            least = least.min(100.0 * (used() - before) / began.elapsed().as_secs_f64());
            if least < 1.0 {
                break;
            }
        }
        println!("{least:.3}");
    });
    std::process::exit(0);
}

/// Seconds of processor time of this process.
fn used() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    // User and system time, in hundredths of a second on every Linux.
    fields[11..13].iter().map(|ticks| ticks.parse::<f64>().expect("a number") / 100.0).sum()
}
