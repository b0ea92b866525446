"""The tasks, a file each. A task is a frozen dataclass: its fields are the settings that a suite may give."""

_HERE = "yoco_megatron.evaluation.tasks"
TASKS = {
    "needle": f"{_HERE}.needle.Needle",
    "multi_needle": f"{_HERE}.multi_needle.MultiNeedle",
    "ruler": f"{_HERE}.ruler.Ruler",
    "phonebook": f"{_HERE}.phonebook.Phonebook",
    "multiple_choice": f"{_HERE}.multiple_choice.MultipleChoice",
    "loss_by_position": f"{_HERE}.loss_by_position.LossByPosition",
    "loss_by_context": f"{_HERE}.loss_by_context.LossByContext",
    "validation_loss": f"{_HERE}.validation_loss.ValidationLoss",
}
"""Name of a task in a suite -> its module and class, imported when a suite names it."""
