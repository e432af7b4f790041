//! Child processes of a test binary: a consumer that can be killed with SIGKILL or told to stop by a signal.

use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, channel},
    },
    thread,
    time::Duration,
};

use polymq_core::{Attempt, Backoff, Bus, ConsumerFactory, ConsumerRunner, Failure, FailurePolicy, Message, RetryMode};

use crate::{
    Cx, PATIENCE,
    cx::{CONNECTING, patient},
};

const MODE: &str = "POLYMQ_TEST_CHILD";
const URL: &str = "POLYMQ_TEST_CHILD_URL";
const QUEUE: &str = "POLYMQ_TEST_CHILD_QUEUE";
const MUTANT: &str = "POLYMQ_TEST_CHILD_MUTANT";
const NOT_CONNECTED: &str = "not connected: ";

/// What a child does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Handles messages of the queue, four at a time, and never ends with any.
    Hold,
    /// The same, as a batch.
    HoldBatch,
    /// Handles ten messages at a time: even ones end after half a second, odd ones never. Drains for ten seconds.
    Drain,
    /// Sends itself a message, then the same as `Hold`, until a signal stops it.
    Stuck,
    /// Says that it listens; fails each message once, says when all three are given back for later, and never ends with what
    /// comes again.
    FailOnce,
    /// A member of [`GROUP`] of a topic: says that it listens, handles five messages and never ends with the sixth.
    Member,
}

/// The group that `Mode::Member` joins.
pub(crate) const GROUP: &str = "billing";
/// How long `Mode::Drain` waits for its handlers.
pub(crate) const DRAIN: Duration = Duration::from_secs(10);
/// How long the retries of `Mode::FailOnce` wait.
pub(crate) const BACKOFF: Duration = Duration::from_secs(8);
/// What a child says when its consumer is there.
pub(crate) const LISTENS: &str = "listens";
/// What a child says when its three messages wait for their retries.
pub(crate) const GAVE_BACK: &str = "gave back";

/// Becomes the child, if this process was started as one. To be called first in `main` by test binaries with
/// `harness = false` that do not use [`Suite::main`](crate::Suite::main).
pub fn run_if_child() {
    let Ok(mode) = std::env::var(MODE) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    // A parent that was killed must not leave a child behind.
    thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(3);
    });
    runtime.block_on(async {
        let url = std::env::var(URL).expect("the parent gives a URL");
        let queue = std::env::var(QUEUE).expect("the parent gives a queue");
        let mut registry = polymq_core::Registry::new();
        let linked = polymq_core::Registry::linked();
        let scheme = url.split(':').next().unwrap_or_default();
        let backend = linked.backend(scheme).expect("the backend is linked");
        registry
            .add(crate::mutant::by_name(std::env::var(MUTANT).ok().as_deref(), Arc::clone(&backend)))
            .expect("one backend");
        let builder = patient(Bus::builder().registry(registry).url(url), &**backend);
        let bus = match builder.connect().await {
            Ok(bus) => bus,
            Err(error) => {
                println!("{NOT_CONNECTED}{error}");
                std::process::exit(4);
            }
        };
        if mode == "FailOnce" {
            fails_once(&bus, &queue).await;
        } else if mode == "Member" {
            is_member(&bus, &queue).await;
        }
        let mut consumers = ConsumerFactory::new(&bus);
        let policy = FailurePolicy { max_attempts: 100, ..FailurePolicy::default() };
        if mode == "HoldBatch" {
            consumers.route_batch(queue.as_str(), 16, |batch: polymq_core::Batch<Message>| async move {
                batch.iter().for_each(say);
                std::future::pending::<()>().await;
            });
        } else {
            let ends = mode == "Drain";
            let route = consumers.route(queue.as_str(), move |message: Message, _: Attempt| async move {
                say(&message);
                if ends && message.payload().last().is_some_and(|last| last % 2 == 0) {
                    return tokio::time::sleep(Duration::from_millis(500)).await;
                }
                std::future::pending::<()>().await;
            });
            route.concurrency(if ends { 10 } else { 4 }).policy(policy);
        }
        if mode == "Stuck" {
            bus.queue(queue.as_str()).send_message(Message::new("stuck")).await.expect("send");
        }
        let drain = if mode == "Drain" { DRAIN } else { PATIENCE };
        let outcome = ConsumerRunner::new(consumers).drain_timeout(drain).run().await;
        println!("ended: {outcome:?}");
    });
    std::process::exit(0);
}

/// See [`Mode::FailOnce`].
async fn fails_once(bus: &Bus, queue: &str) {
    let mut consumers = ConsumerFactory::new(bus);
    let route = consumers.route(queue, |message: Message, attempt: Attempt| async move {
        if attempt.0 > 1 {
            std::future::pending::<()>().await;
        }
        say(&message);
        Err::<(), _>(Failure::new("the first time"))
    });
    let policy = FailurePolicy { max_attempts: 100, backoff: Backoff::fixed(BACKOFF), ..FailurePolicy::default() };
    route.concurrency(4).policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("start");
    println!("{LISTENS}");
    while running.stats(queue).expect("it runs").retried < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("{GAVE_BACK}");
    std::future::pending().await
}

/// See [`Mode::Member`].
async fn is_member(bus: &Bus, topic: &str) {
    let handled = Arc::new(AtomicUsize::new(0));
    let mut consumers = ConsumerFactory::new(bus);
    let route = consumers.route(topic, move |message: Message| {
        let handled = Arc::clone(&handled);
        async move {
            say(&message);
            if handled.fetch_add(1, Ordering::SeqCst) >= 5 {
                std::future::pending::<()>().await;
            }
        }
    });
    // In place, because the default needs delayed retries, which are not what this is about.
    route.group(GROUP).policy(FailurePolicy { mode: RetryMode::InPlace, ..FailurePolicy::default() });
    let _running = ConsumerRunner::new(consumers).start().await.expect("start");
    println!("{LISTENS}");
    std::future::pending().await
}

/// One line for the parent: the handler has this message.
fn say(message: &Message) {
    println!("handling {}", String::from_utf8_lossy(message.payload()));
}

/// A running child.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    lines: Receiver<String>,
    /// Ends the child when it is dropped.
    _stdin: ChildStdin,
}

impl Running {
    pub(crate) fn start(cx: &Cx, mode: Mode, queue: &str) -> Self {
        Self::start_at(cx, mode, queue, cx.harness().url(None))
    }

    pub(crate) fn start_at(cx: &Cx, mode: Mode, queue: &str, url: String) -> Self {
        // Not its path: a build beside this run may have replaced the file.
        let itself = PathBuf::from("/proc/self/exe");
        let program = if itself.exists() { itself } else { std::env::current_exe().expect("a path") };
        let mut child = Command::new(program)
            .env(MODE, format!("{mode:?}"))
            .env(URL, url)
            .env(QUEUE, queue)
            .envs(cx.harness().child_environment())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the test binary starts again as a child");
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().expect("piped"));
        thread::spawn(move || output.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok()));
        let stdin = child.stdin.take().expect("piped");
        Self { child, lines, _stdin: stdin }
    }

    /// The next line that it prints; blocks.
    ///
    /// # Panics
    /// When the child could not connect.
    pub(crate) fn line(&self, within: Duration) -> Option<String> {
        let line = self.lines.recv_timeout(within).ok()?;
        if let Some(error) = line.strip_prefix(NOT_CONNECTED) {
            panic!("{CONNECTING}in a child: {error}");
        }
        Some(line)
    }

    /// Reads until it says this; blocks.
    pub(crate) fn says(&self, expected: &str) {
        while self.line(PATIENCE).unwrap_or_else(|| panic!("the child does not say {expected:?}")) != expected {}
    }

    /// Sends a signal, by name.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name} of the child");
    }

    /// Whether it has ended, and how.
    pub(crate) fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().expect("the child is ours")
    }

    /// SIGKILL; returns when it is gone.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("the child is ours");
        self.child.wait().expect("the child is ours");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a blocking task has to say about a child; its panic is the case's.
pub(crate) async fn watched<T>(watcher: tokio::task::JoinHandle<T>) -> T {
    watcher.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// The variable that makes a child use a mutant.
pub(crate) fn mutant_variable(name: &str) -> (String, String) {
    (MUTANT.to_owned(), name.to_owned())
}
