//! The servers themselves: polymq's, how soon each answers, and what it takes to keep messages.

use std::time::Duration;

use bytes::Bytes;
use harness::{
    Numbers, Options,
    broker::payload,
    plan::{Broker, Instance},
};

use crate::{nats, plan::brokers, polymq, queue, rabbitmq};

/// polymq's broker, durable, until the process is ended.
pub fn serve(address: &str, folder: &str) {
    let (address, folder) = (address.to_owned(), folder.to_owned());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async move {
        let broker = polymq_broker::Broker::builder().listen(address).data_dir(folder);
        let _broker = broker.start().await.expect("started");
        std::future::pending::<()>().await;
    });
}

fn asked(options: &Options) -> Broker {
    let kind = options.need("broker");
    brokers().into_iter().find(|broker| broker.kind == kind).expect("a broker of the plan")
}

/// Starts one of its own and waits for its first answer.
async fn started(broker: &Broker) -> Instance {
    let program = std::env::current_exe().expect("a program");
    let instance = Instance::begin(&program, broker).expect("begun");
    loop {
        let ready = match broker.kind.as_str() {
            "rabbitmq" => rabbitmq::answers(&instance.url).await,
            "nats" => nats::answers(&instance.url).await,
            _ => polymq::answers(&instance.url).await,
        };
        if ready && instance.pid().is_some() {
            return instance;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// How long a process has run, to ten milliseconds.
fn age(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields = stat.rsplit_once(')').expect("a name in brackets").1.split_whitespace();
    let ticks: u64 = fields.skip(19).next().and_then(|ticks| ticks.parse().ok()).expect("when it began");
    let uptime = std::fs::read_to_string("/proc/uptime").expect("/proc is mounted");
    let uptime: f64 = uptime.split(' ').next().and_then(|seconds| seconds.parse().ok()).expect("seconds");
    Duration::from_secs_f64((uptime - ticks as f64 / 100.0).max(0.0))
}

pub async fn start(options: Options) -> Numbers {
    let instance = started(&asked(&options)).await;
    vec![("start_ms", age(instance.pid().expect("it runs")).as_secs_f64() * 1e3)]
}

pub async fn stored(options: Options) -> Numbers {
    let broker = asked(&options);
    let instance = started(&broker).await;
    let body: Bytes = payload(&options).into();
    match broker.kind.as_str() {
        "rabbitmq" => rabbitmq::fill(&options, &instance.url, &queue(), &body, options.messages()).await,
        "nats" => nats::fill(&instance.url, &queue(), &body, options.messages()).await,
        _ => polymq::fill(&instance.url, &queue(), &body, options.messages()).await,
    }
    let status = format!("/proc/{}/status", instance.pid().expect("it runs"));
    let status = std::fs::read_to_string(status).expect("it runs");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    let kilobytes: f64 = resident.and_then(|text| text.trim().parse().ok()).expect("a number");
    vec![("memory_mb", kilobytes / 1e3), ("disk_mb", instance.disk() as f64 / 1e6)]
}
