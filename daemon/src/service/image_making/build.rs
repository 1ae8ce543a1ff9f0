//! `pileus image build`: an image by a recipe. Its image is launched as a throw-away instance, the steps are
//! carried out in it, then it is cleaned up and shut down.

use pileus_api::{BuildRequest, OperationKind};
use pileus_base::{Code, Error, Phase, Reporter, Result};

use super::super::archive::Export;
use super::super::{Service, order, wiring};
use super::publish::Made;
use super::recipe::{self, About, From, Work};
use super::throwaway::{self, Throwaway};
use super::upload::{Copies, Upload};
use crate::http::listener::Peer;

impl Service {
    /// Begins to carry a recipe out. What is wrong with the recipe itself is told at once.
    pub async fn build_image(&self, upload: Upload, peer: Peer) -> Result<Export> {
        let Upload { request, copies } = upload;
        let BuildRequest { tag, .. } = &request;
        self.check_tag(tag.as_deref())?;
        let name = throwaway::name("build")?;
        let recipe = recipe::check(request, name.clone())?;
        self.parts.hypervisor.get().await?;
        let service = self.clone();
        let recipe::Order {
            from,
            steps,
            clean,
            keep_on_error,
            about,
        } = recipe;
        match from {
            From::Install(install) => {
                let install = self.open_install(*install, peer)?;
                let target = name.to_string();
                self.making(OperationKind::BuildImage, target, |report| async move {
                    service.install_now(name, install, about, &report).await
                })
                .await
            }
            From::Image(launch) => {
                let mut launch = order::check(*launch)?;
                launch.wanted.open_as(&self.parts.mode, peer)?;
                self.making(
                    OperationKind::BuildImage,
                    name.as_str(),
                    |report| async move {
                        let plan = Plan {
                            launch,
                            steps,
                            copies,
                            clean,
                            keep_on_error,
                            about,
                        };
                        service.build_now(plan, &report).await
                    },
                )
                .await
            }
        }
    }

    async fn build_now(&self, plan: Plan, report: &Reporter) -> Result<Made> {
        let Plan {
            launch,
            steps,
            mut copies,
            clean,
            keep_on_error,
            about,
        } = plan;
        let machine = Throwaway::new(self, self.reserve(&launch, Vec::new()).await?);
        let done = async {
            self.carry_out(&launch, machine.instance()?, report)
                .await
                .map_err(without_advice)?;
            report.phase(Phase::Provisioning);
            for (done, work) in steps.iter().enumerate() {
                report.progress(done as u64, Some(steps.len() as u64));
                machine.carry_out(work, &mut copies, report).await?;
            }
            match clean {
                true => machine.clean_up(report).await?,
                false => {
                    machine.trim(report).await?;
                    machine.shut_down(report).await?;
                }
            }
            let row = machine.instance()?.row();
            let image = row.spec.image.as_ref();
            let image = image.and_then(|image| self.parts.store.get(&image.digest));
            let image = image.ok_or_else(|| wiring::no_image(&row))?;
            // Its layers stay what they are until they were read.
            let _turn = machine.instance()?.turn(report).await?;
            let parts = self.parts_of(&machine, &image)?;
            let source = format!("recipe from {}", launch.wanted.source);
            let mut info = self.info_of(Some(image.info()), source, &about);
            if about.title.is_none() {
                info.title.clone_from(&image.info().title);
            }
            info.recipe.clone_from(&about.recipe);
            info.made_of = Some(match &about.recipe {
                Some(recipe) => format!("{} by the recipe {recipe}", launch.wanted.source),
                None => launch.wanted.source.clone(),
            });
            let stays = about.tag.is_some();
            self.publish(&parts, info, stays, report).await
        };
        match done.await {
            Ok((image, is_new)) => {
                machine.end().await;
                Ok(Made {
                    image,
                    is_new,
                    tag: about.tag,
                })
            }
            Err(err) if keep_on_error && err.code == Code::StepFailed => {
                Err(machine.keep_for_a_look(err).await)
            }
            Err(err) => {
                machine.end().await;
                Err(err)
            }
        }
    }
}

struct Plan {
    launch: order::Order,
    steps: Vec<Work>,
    copies: Copies,
    clean: bool,
    keep_on_error: bool,
    about: About,
}

/// What a launch advises is for an instance that stays.
fn without_advice(mut err: Error) -> Error {
    if err.class() == pileus_base::Class::Guest {
        err.advice = None;
    }
    err
}
