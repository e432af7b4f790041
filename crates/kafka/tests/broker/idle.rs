//! What a consumer costs that has nothing to do.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    time::Duration,
};

use polymq_core::{Body, Bus, ConsumerFactory, ConsumerRunner};

use crate::harness::{name, url};

const CHILD: &str = "TEST_KAFKA_IDLE";
const WATCHED: Duration = Duration::from_secs(30);

/// Becomes the idle one, if this process was started as one.
pub fn run_if_child() {
    let Ok(url) = std::env::var(CHILD) else { return };
    // A parent that was killed must not leave a child behind.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(3);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    runtime.block_on(async {
        let bus = Bus::connect(&url).await.expect("connect");
        let queue = name("idle");
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.route(queue.as_str(), |body: Body| async move { drop(body) });
        let _running = ConsumerRunner::new(consumers).start().await.expect("starts");
        // It has its partitions, and has sent something.
        bus.queue(queue.as_str()).send_message(polymq_core::Message::new("one")).await.expect("accepted");
        println!("idle");
        std::future::pending::<()>().await;
    });
}

/// Hundredths of a second, of all threads, in user and kernel: fields 14 and 15 of proc(5).
fn used(process: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("it runs");
    let fields = stat.rsplit_once(')').expect("a name in parentheses").1;
    fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().expect("a number")).sum()
}

/// Mission row J11.
pub async fn j11_an_idle_consumer_costs_less_than_a_hundredth_of_a_core() {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.env(CHILD, url()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("a child");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    assert_eq!(tokio::task::block_in_place(|| lines.next()).expect("a line").expect("text"), "idle");
    // What belongs to starting is over.
    tokio::time::sleep(Duration::from_secs(3)).await;
    // The same work costs more on a crowded machine: the best of three counts.
    let mut windows = Vec::new();
    while windows.len() < 3 && !windows.iter().any(|hundredths| *hundredths <= WATCHED.as_secs()) {
        let before = used(child.id());
        tokio::time::sleep(WATCHED).await;
        windows.push(used(child.id()) - before);
    }
    child.kill().expect("killed");
    child.wait().expect("gone");
    let best = windows.iter().min().expect("at least one");
    assert!(*best <= WATCHED.as_secs(), "{windows:?} hundredths of a second in {WATCHED:?}");
}
