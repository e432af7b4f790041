//! What the measured programs share. Each run of such a program is one measurement: it takes a scenario's name and
//! `key=value` options, and prints one JSON object of numbers. With `tables` it prints its [`plan`] instead.

pub mod broker;
pub mod service;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::BTreeMap,
    future::Future,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

pub use plan;
use tokio::{runtime::Runtime, sync::Notify};

/// The system allocator, counting what is allocated while a meter runs that was asked to.
struct Counting;

static COUNTS: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

fn count(size: usize) {
    if COUNTS.load(Ordering::Relaxed) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(size as u64, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The options of a scenario.
#[derive(Debug, Clone)]
pub struct Options(BTreeMap<String, String>);

impl Options {
    /// An option, or what it is without being said.
    pub fn get<T: std::str::FromStr>(&self, key: &str, default: T) -> T {
        match self.0.get(key) {
            None => default,
            Some(text) => text.parse().unwrap_or_else(|_| panic!("{key}={text} cannot be read")),
        }
    }

    /// An option that must be there.
    pub fn need(&self, key: &str) -> &str {
        self.0.get(key).unwrap_or_else(|| panic!("{key}=... is missing"))
    }

    /// How many messages to measure.
    pub fn messages(&self) -> u64 {
        self.get("n", 100_000)
    }
}

/// The numbers that a measurement gives, by name.
pub type Numbers = Vec<(&'static str, f64)>;

/// Times what is between [`start`](Meter::start) and [`stop`](Meter::stop); counts its allocations instead with `count=1`.
pub struct Meter {
    wall: Instant,
    cpu: Duration,
}

impl Meter {
    pub fn start(options: &Options) -> Self {
        if options.get("count", 0) == 1 {
            COUNTS.store(true, Ordering::SeqCst);
        }
        Self { wall: Instant::now(), cpu: cpu_time() }
    }

    /// Per message.
    pub fn stop(self, messages: u64) -> Numbers {
        let (wall, cpu) = (self.wall.elapsed(), cpu_time() - self.cpu);
        let counted = COUNTS.swap(false, Ordering::SeqCst);
        let per = |value: f64| value / messages as f64;
        if counted {
            vec![
                ("allocations", per(ALLOCATIONS.load(Ordering::SeqCst) as f64)),
                ("allocated_bytes", per(BYTES.load(Ordering::SeqCst) as f64)),
            ]
        } else {
            vec![
                ("ns", per(wall.as_nanos() as f64)),
                ("cpu_ns", per(cpu.as_nanos() as f64)),
                ("per_second", messages as f64 / wall.as_secs_f64()),
            ]
        }
    }
}

/// Processor time of this process so far, of all its threads, in user and kernel.
pub fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a value of the type that the call writes.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A field of `/proc/self/status` in bytes: `VmRSS` is what is resident now, `VmHWM` the most that ever was.
pub fn memory(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kilobytes: f64 = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).expect("a number of kB");
    kilobytes * 1024.0
}

/// Counts handled messages down; the same for every path, so that its cost is in every number alike.
pub struct Latch {
    remaining: AtomicUsize,
    done: Notify,
}

impl Latch {
    pub const fn new() -> Self {
        Self { remaining: AtomicUsize::new(0), done: Notify::const_new() }
    }

    pub fn expect(&self, messages: u64) {
        self.remaining.store(messages as usize, Ordering::SeqCst);
    }

    pub fn remaining(&self) -> usize {
        self.remaining.load(Ordering::SeqCst)
    }

    #[inline]
    pub fn arrived(&self) {
        if self.remaining.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.done.notify_one();
        }
    }

    pub async fn wait(&self) {
        self.done.notified().await;
    }
}

impl Default for Latch {
    fn default() -> Self {
        Self::new()
    }
}

/// One thread for everything: the pure cost of a message.
pub fn one_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// What `#[tokio::main]` gives on two cores.
pub fn two_threads() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Runs a future as a task, as services run: the thread's own future is not measured.
pub fn block_on<F>(runtime: Runtime, future: F) -> F::Output
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let output = runtime.block_on(async move { tokio::spawn(future).await.expect("no panic") });
    runtime.shutdown_background();
    output
}

/// A percentile of sorted values.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let at = (percent / 100.0 * (sorted.len() - 1) as f64).round() as usize;
    sorted[at]
}

/// What a scenario is: a name, and what runs it.
pub type Scenario = (&'static str, fn(&Options) -> Numbers);

/// The longest that one measurement may take, besides two milliseconds a message; under valgrind everything takes fifty
/// times as long.
const LIMIT: Duration = Duration::from_secs(180);

/// The `main` of a measured program. Its plan is made for a quick run (`tables quick`) or a whole one (`tables`).
pub fn main(plan: fn(bool) -> plan::Plan, scenarios: &[Scenario]) {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    if name == "tables" {
        let plan = plan(arguments.next().is_some());
        println!("{}", serde_json::to_string(&plan).expect("made of text and numbers"));
        return;
    }
    let Some((_, run)) = scenarios.iter().find(|(known, _)| *known == name) else {
        let names: Vec<_> = scenarios.iter().map(|(name, _)| *name).collect();
        eprintln!("usage: PROGRAM tables [quick] | SCENARIO [KEY=VALUE...]; scenarios: {}", names.join(", "));
        std::process::exit(2);
    };
    // A task that panics must not leave the others waiting, nor a message that is lost the whole run.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("{panic}");
        std::process::exit(101);
    }));
    let pairs = arguments.map(|argument| match argument.split_once('=') {
        Some((key, value)) => (key.to_owned(), value.to_owned()),
        None => panic!("{argument} is not KEY=VALUE"),
    });
    let options = Options(pairs.collect());
    let limit = LIMIT + Duration::from_millis(2 * options.messages());
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        eprintln!("not done within {limit:?}");
        std::process::exit(102);
    });
    let numbers = run(&options);
    let object: serde_json::Map<_, _> =
        numbers.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    println!("{}", serde_json::Value::Object(object));
}
