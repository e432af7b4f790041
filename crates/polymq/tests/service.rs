//! A whole service as a process: how it ends, and what it tells.
#![cfg(all(unix, feature = "macros"))]

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use polymq::prelude::*;

/// Tells the child process which service it is.
const SERVICE: &str = "SERVICE_UNDER_TEST";

/// Told when the main of "fails when told" is about to fail.
static FAILED: tokio::sync::Notify = tokio::sync::Notify::const_new();

#[consumer("slow")]
async fn slow(text: String) {
    println!("started {text}");
    if std::env::var(SERVICE).is_ok_and(|service| service == "fails when told") {
        FAILED.notified().await; // however late the signal comes
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    println!("finished {text}");
}

/// Sends and ends: the consumer goes on.
async fn ends(bus: Bus) -> Result<()> {
    bus.queue("slow").send(&"one").await?;
    Ok(())
}

/// Sends and never ends.
async fn never_ends(bus: Bus) -> Result<()> {
    bus.queue("slow").send(&"one").await?;
    std::future::pending().await
}

/// Fails, with an error of several lines.
async fn fails(_bus: Bus) -> Result<(), std::io::Error> {
    Err(std::io::Error::other("first line\n  second line\n"))
}

/// Fails while a handler is being drained.
async fn fails_when_told(bus: Bus) -> Result<(), std::io::Error> {
    let mut told = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    bus.queue("slow").send(&"one").await.map_err(std::io::Error::other)?;
    told.recv().await;
    FAILED.notify_one();
    Err(std::io::Error::other("told to end"))
}

/// Not a test: what the child process runs.
#[test]
fn child() {
    let code = match std::env::var(SERVICE).as_deref() {
        Ok("ends") => polymq::run(ends),
        Ok("never ends") => polymq::run(never_ends),
        Ok("fails") => polymq::run(fails),
        Ok("fails when told") => polymq::run(fails_when_told),
        #[cfg(feature = "ops")]
        Ok("three") => match three() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        _ => return,
    };
    std::process::exit(i32::from(code != ExitCode::SUCCESS));
}

/// One call that runs the three handlers of a factory, with a host and a port.
#[cfg(feature = "ops")]
#[tokio::main]
async fn three() -> Result<()> {
    async fn print(text: String, context: polymq::Context) {
        println!("\n{} got {text}", context.channel());
    }
    let bus = Bus::connect("memory://three").await?;
    let mut consumers = ConsumerFactory::new(&bus);
    for queue in ["one", "two", "three"] {
        consumers.route(queue, print);
        bus.queue(queue).send(&"it").await?;
    }
    let address = std::env::var("ADDRESS")?;
    ConsumerRunner::new(consumers).bind(address).run().await?;
    println!("\nreturned");
    Ok(())
}

#[cfg(feature = "ops")]
#[test]
fn d4_one_call_runs_every_handler_until_a_signal() {
    use std::io::Write;

    let address = std::net::SocketAddr::from(([127, 0, 0, 1], polymq_testkit::free_port()));
    let mut process = start("three").env("ADDRESS", address.to_string()).stdout(Stdio::piped()).spawn().unwrap();
    let mut printed = BufReader::new(process.stdout.take().unwrap()).lines().map_while(|line| line.ok());
    let mut got: Vec<_> = printed.by_ref().filter(|line| line.ends_with("got it")).take(3).collect();
    got.sort();
    assert_eq!(got, ["one got it", "three got it", "two got it"]);
    // A handler may be faster than the word that its subscription has started.
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    loop {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /ready HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        if answer.starts_with("HTTP/1.1 200") {
            break;
        }
        assert!(answer.starts_with("HTTP/1.1 503") && std::time::Instant::now() < deadline, "{answer}");
    }
    signal(&process, "-TERM");
    assert!(printed.any(|line| line == "returned"), "the call returns after the signal");
    assert_eq!(process.wait().unwrap().code(), Some(0));
}

fn start(service: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child", "--exact", "--nocapture"]).env(SERVICE, service);
    command.env_remove("POLYMQ_BACKEND").env_remove("POLYMQ_URL");
    command
}

fn signal(process: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &process.id().to_string()]).status().unwrap().success());
}

/// A signal is sent while a handler runs: it ends its work, and the process ends with 0.
fn drains_after(service: &str, kind: &str) {
    let mut process = start(service).stdout(Stdio::piped()).spawn().unwrap();
    let mut printed = BufReader::new(process.stdout.take().unwrap()).lines().map_while(|line| line.ok());
    assert!(printed.any(|line| line.ends_with("started one")));
    signal(&process, kind);
    assert!(printed.any(|line| line == "finished one"), "the handler was cut off");
    assert_eq!(process.wait().unwrap().code(), Some(0));
}

#[test]
fn sigint_drains() {
    drains_after("ends", "-INT");
}

#[test]
fn sigterm_drains() {
    drains_after("ends", "-TERM");
}

#[test]
fn a_signal_drains_while_main_still_runs() {
    drains_after("never ends", "-TERM");
}

#[test]
fn a_main_that_fails_during_the_drain_ends_the_process_after_it() {
    let mut process = start("fails when told").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut printed = BufReader::new(process.stdout.take().unwrap()).lines().map_while(|line| line.ok());
    assert!(printed.any(|line| line.ends_with("started one")));
    signal(&process, "-TERM");
    assert!(printed.any(|line| line == "finished one"), "the handler was cut off");
    let told = std::time::Instant::now();
    let code = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status.code();
        }
        if told.elapsed() > Duration::from_secs(30) {
            process.kill().unwrap();
            process.wait().unwrap();
            panic!("the drain is over, and the process goes on");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut error = String::new();
    process.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    assert_eq!((code, error.trim_end()), (Some(1), "error: told to end"));
}

#[test]
fn an_error_is_one_line_and_code_1() {
    let mut process = start("fails").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut told = String::new();
    process.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    assert_eq!(told.trim_end(), "error: first line; second line");
    assert_eq!(process.wait().unwrap().code(), Some(1));
}

#[test]
fn a_wrong_variable_is_one_line_and_code_1() {
    let output = start("ends").env("POLYMQ_BACKEND", "kakfa").output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.starts_with("error: unknown backend \"kakfa\"; linked: "), "{told}");
    assert_eq!(output.status.code(), Some(1));
}

#[cfg(feature = "ops")]
#[tokio::test]
async fn an_address_that_is_taken_is_found_before_a_message_is_handled() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let bus = Bus::builder().backend("memory").environment(polymq::Environment::default()).connect().await.unwrap();
    bus.queue("one").send(&"it").await.unwrap();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("one", |_: String| async {});
    let error = ConsumerRunner::new(consumers).bind(&*address).start().await.unwrap_err();
    assert_eq!(error.kind(), polymq::ErrorKind::Config);
    assert!(error.to_string().contains(&address), "{error}");
    assert_eq!(bus.queue("one").stats(None).await.unwrap().ready, 1);
}
