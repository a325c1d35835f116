"""Requests to describe an image, for reconstruction alignment: any of them stands for the whole picture."""

DESCRIBE_TEMPLATES: tuple[str, ...] = (
    "Describe this.",
    "What is here?",
    "Name all that is visible.",
    "What does the image show?",
    "Say what you see.",
    "Describe the image in detail.",
    "Give a full account of the scene.",
    "Which things are in the picture?",
    "Explain the picture to someone who cannot see it.",
    "Write a caption that leaves nothing out.",
    "Sum up the image, then go into its details.",
    "Talk me through this picture from left to right.",
    "Tell me about everything in view, near and far.",
    "How would you put this image into words?",
    "List the objects, and say how many there are of each.",
    "Describe each object with its colour and its shape.",
    "Where is each thing, and what lies beside it?",
    "What stands in front, and what is behind it?",
    "Write the prompt from which this image could be drawn.",
    "Give a painter all the information needed to copy this picture.",
    "Describe the people, animals and things, and what they are doing.",
    "Note the colours, the light and the mood of the picture.",
    "What would you have to write down to remember this image exactly?",
    "Go over the picture row by row and report what you find.",
    "Begin with the main subject, then describe what surrounds it.",
    "Is it a photograph, a painting or a drawing, and what does it depict?",
    "Describe the background as carefully as the foreground.",
    "Which materials and textures can be made out, and on which objects?",
    "Report how large the objects are compared with one another.",
    "Copy any text that appears in the image, and say where it stands.",
    "Describe the setting: the place, the time of day and the weather, if they can be told.",
    "Give the positions of the objects: what is above, below, to the left and to the right of what?",
    "State plainly what is shown. Do not guess at anything that cannot be seen.",
    "In a few sentences, cover the subject, the setting, the colours and the composition.",
    "Write a paragraph that would let a reader picture this scene without having seen it.",
    "Count what can be counted, name what can be named, and place each thing where it belongs.",
    "Imagine that the image is lost and only your words remain: what has to be said about it?",
    "Describe the style of the image, how it was made, and what draws the eye first.",
    "What is the overall impression, and which details bring it about? Mention light, shadow and contrast.",
    "For every object, give its kind, its colour, its size, its surface and its place in the picture.",
    "Look at the centre of the image first, then at its corners, and describe what is found in each of these places.",
    "Describe the image for an archive: the subject, the number of things shown, their arrangement, the palette, and "
    "the quality of the picture.",
    "Provide a description so complete that two people who read it would draw the same picture, down to the colours, "
    "the sizes and the distances between the objects.",
    "Explain what is going on, who or what takes part in it, how everything is arranged in space, and how the light "
    "falls on it.",
    "Write down what is in this image as a list of facts: objects, attributes, numbers, relations and any writing. "
    "Then add a sentence on the style and one on the background.",
    "Take your time and describe the whole image: what it is about, what each part looks like, which shapes and "
    "textures there are, how many of each thing there are, and how the parts stand to one another.",
    "Describe this picture in as much detail as you can. Include the main subject and its pose, the colours and "
    "materials, any text, the surroundings, the camera's point of view, and how sharp and how bright the picture is.",
)
"""Short and long ones, from a glance to an inventory; all are equally likely."""
