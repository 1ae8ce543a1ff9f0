//! One file a command: its options and what it does. What several share stands beside this folder.

pub mod completions;
pub mod delete;
pub mod exec;
pub mod find;
pub mod fork;
pub mod get;
pub mod help;
pub mod images;
pub mod info;
pub mod launch;
pub mod list;
pub mod logs;
pub mod purge;
pub mod recover;
pub mod restart;
pub mod run;
pub mod set;
pub mod shell;
pub mod start;
pub mod stop;
pub mod template;
pub mod verify_unique;
pub mod version;
pub mod wait_ready;
