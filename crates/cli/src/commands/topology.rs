//! `polymq topology`: what must exist, planned or made.

use polymq::{BusBuilder, Step, StepKind, StepState, Topology};
use serde_json::{Value, json};

use super::connect;
use crate::{
    args::{TopologyCommand, TopologyOf},
    exit::{Exit, Failed},
    output::Output,
};

pub(crate) async fn run(builder: BusBuilder, command: TopologyCommand, output: &Output) -> Result<Exit, Failed> {
    let (TopologyCommand::Plan(of) | TopologyCommand::Apply(of)) = &command;
    // A file that cannot be read is found before anything is connected.
    let topology = read(of)?;
    let bus = connect(builder, output).await?;
    let (plan, word) = match &command {
        TopologyCommand::Plan(_) => (topology.plan(&bus).await?, "missing"),
        TopologyCommand::Apply(_) => (topology.apply(&bus).await?, "made"),
    };
    for step in &plan.steps {
        let state = if step.state == StepState::Missing { word.to_owned() } else { step.state.to_string() };
        output.say(|| format!("{state}: {}", step.what), || object(step, &state))?;
    }
    let count = plan.missing().count();
    output.note(&match &command {
        TopologyCommand::Plan(_) => format!("{count} of {} missing; nothing was changed", plan.steps.len()),
        TopologyCommand::Apply(_) => format!("{count} made"),
    });
    bus.close().await?;
    Ok(Exit::Done)
}

fn read(of: &TopologyOf) -> Result<Topology, Failed> {
    let mut topology = match &of.file {
        Some(path) => Topology::from_file(path)?,
        None => Topology::new(),
    };
    for name in &of.queue {
        topology = topology.queue(name);
    }
    for name in &of.topic {
        topology = topology.topic(name);
    }
    for (topic, group) in &of.group {
        topology = topology.group(topic, group);
    }
    Ok(topology)
}

fn object(step: &Step, state: &str) -> Value {
    match &step.what {
        StepKind::Channel { address, group } => {
            json!({ "state": state, "kind": address.kind().to_string(), "name": address.name(), "group": group })
        }
        StepKind::Binding { queue, topic } => {
            json!({ "state": state, "kind": "binding", "name": queue.name(), "topic": topic.name() })
        }
    }
}
