//! What is particular to SQS and SNS.
fn main() {}
